"""The checkpoint from nothing, stage by stage; what a stage has finished is not done again.

make(Path("tiny"), Recipe())

Started by `accelerate launch` each process takes its part of every step. A step is made of `PARTS` micro-batches
whatever the number of processes: it decides only how long it takes.

Shapes: `B C T H W` = batch, channels, latent frames, latent rows, latent columns.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...config import TINY, ModelConfig
from ...errors import TrainingError
from ...pipeline import MochiPipeline, decode
from ...preview import LatentColours
from ...text.tokenizer import read_tokenizer
from ...weights import build
from ...weights.writer import write_whole
from ..loop import LoopOptions, Task, Watch, run, unseen
from ..metrics import read_metrics
from ..optimizer import OptimizerOptions
from ..trainer import training_device
from . import evaluate, scenes
from .card import Measured, Spent, card
from .dit import MAIN_FRAMES, DiTRecipe, DiTTask, new_dit
from .files import LICENSE, ModelFiles, metadata, rewritten
from .latents import Cache, encoded
from .text import Reader, TextTask, new_t5
from .tokenizer import write_tokenizer
from .vae import VAE, Crops, VAERecipe, VAETask, new_vae

log = logging.getLogger(__name__)

PARTS = 2
STAGES = ("text", "vae", "decoder", "dit")
USUAL_MINUTES = 75.0
WORK, TIMES, LOG = "work", "times.json", "training.json"
LOGGED_POINTS = 60  # of each stage's curves
MOST_LATENT_FRAMES = 5
LONG_SHARE = 12  # one clip in so many is of the longest kind

TEXT_RATES = OptimizerOptions(
    "adamw", 3e-3, weight_decay=0.0, betas=(0.9, 0.98), warmup=20, schedule="cosine", final_rate=0.02
)
VAE_RATES = OptimizerOptions(
    "muon", 0.02, weight_decay=0.0, betas=(0.9, 0.99), warmup=20, schedule="cosine", final_rate=0.03, vector_rate=3e-3
)
DECODER_RATES = replace(VAE_RATES, rate=0.008, vector_rate=1e-3)
DIT_RATES = OptimizerOptions(
    "muon",
    0.02,
    weight_decay=0.0,
    betas=(0.9, 0.98),
    warmup=30,
    schedule="linear",
    hold=0.5,
    final_rate=0.02,
    vector_rate=2e-3,
    slow={"pos_frequencies": 0.1},
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint. `clips` are cached for the DiT."""

    config: ModelConfig = TINY
    seed: int = 0
    text_steps: int = 400
    vae_steps: int = 2000
    decoder_steps: int = 600
    clips: int = 8000
    dit_steps: int = 3600
    text_batch: int = 128
    vae: VAERecipe = VAERecipe()
    decoder: VAERecipe = VAERecipe(kl=0.0, crops=((0.0, Crops(1, scenes.FRAMES, scenes.SIZE)),))
    dit: DiTRecipe = DiTRecipe()
    asked: int = 200
    evaluated: evaluate.Settings = evaluate.Settings()
    save_every: int = 100

    def scaled(self, share: float) -> "Recipe":
        """The same in another time: so many of each stage's steps, and of the clips."""
        names = ("text_steps", "vae_steps", "decoder_steps", "clips", "dit_steps")
        return replace(self, **{name: max(1, round(getattr(self, name) * share)) for name in names})


def make(out: Path, recipe: Recipe = Recipe(), watch: Watch = unseen, device: str = "auto") -> Measured | None:
    """Writes the checkpoint and its card to `out`; returns what was measured, in the leading process.

    Raises `TrainingError` when the folder holds a checkpoint begun with another recipe, or the device is not here.
    """
    return _Make(out, recipe, watch, device).whole()


@dataclass
class _Make:
    out: Path
    recipe: Recipe
    watch: Watch
    on: str
    times: dict[str, Spent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from accelerate import PartialState  # slow to import

        self.device = training_device(self.on)
        self.processes = PartialState(cpu=self.device.type == "cpu")
        if PARTS % self.processes.num_processes:
            raise TrainingError(
                f"There are {self.processes.num_processes} processes",
                f"each must take as many of a step's {PARTS} parts",
                f"Start 1 or {PARTS}",
            )
        self.work, self.files = self.out / WORK, ModelFiles(self.out)
        self.work.mkdir(parents=True, exist_ok=True)
        if (self.work / TIMES).exists():
            held = json.loads((self.work / TIMES).read_text())
            self.times = {name: Spent(**spent) for name, spent in held.items()}

    def whole(self) -> Measured | None:
        recipe, config, seed = self.recipe, self.recipe.config, self.recipe.seed
        if self._leads and not self.files.tokenizer.exists():
            write_tokenizer(self.files.tokenizer)
        self.processes.wait_for_everyone()
        tokenizer = read_tokenizer(self.files.tokenizer)

        reader = Reader(new_t5(config.text, seed)).to(self.device)
        task: Task = TextTask(reader, tokenizer, seed, recipe.text_batch, metadata=metadata(config.text))
        text = self._learnt("text", task, recipe.text_steps, TEXT_RATES, 0.99)

        said = metadata(config.vae)
        task = VAETask(
            new_vae(config.vae, seed).to(self.device), recipe.vae, recipe.vae_steps * PARTS, seed, metadata=said
        )
        vae = self._learnt("vae", task, recipe.vae_steps, VAE_RATES, 0.99)
        halves = read_vae(vae).to(self.device)
        task = VAETask(halves, recipe.decoder, recipe.decoder_steps * PARTS, seed + 1, True, metadata=said)
        vae = self._learnt("decoder", task, recipe.decoder_steps, DECODER_RATES, 0.99)

        caches = self._latents(vae)
        statistics = caches[MAIN_FRAMES].statistics()
        said = metadata(config.dit, statistics)
        t5: Any = build.load_t5(text, dtype=torch.float32)
        dit = new_dit(config.dit, seed).to(self.device)
        task = DiTTask(dit, t5.to(self.device), tokenizer, caches, statistics, recipe.dit, seed, said)
        learnt = self._learnt("dit", task, recipe.dit_steps, DIT_RATES, 0.998)
        if not self._leads:
            return None

        with self._timed("measuring"):
            colours = fitted_colours(read_vae(vae), caches[MAIN_FRAMES])
            rewritten(learnt, self.files.dit, said | colours.metadata)
            rewritten(vae, self.files.vae, metadata(config.vae, statistics))
            rewritten(text, self.files.t5, metadata(config.text))
            measured = measure(self.files, recipe.asked, recipe.evaluated)
        self._write_card(measured, statistics.std)
        self._write_log(measured)
        return measured

    def _learnt(self, name: str, task: Task, steps: int, rates: OptimizerOptions, ema: float) -> Path:
        """The file of a stage's finished training."""
        folder = self.work / name
        options = LoopOptions(
            steps,
            accumulation=PARTS // self.processes.num_processes,
            ema=ema,
            save_every=self.recipe.save_every,
            optimizer=rates,
            tensorboard=False,
        )
        log.info("%s: %s steps", name, steps)
        with self._timed(name):
            path = run(task, options, folder, self.watch)
        self.processes.wait_for_everyone()
        return folder / "final.safetensors" if path == folder else path

    def _latents(self, vae: Path) -> Mapping[int, Cache]:
        counts = {
            MAIN_FRAMES: self.recipe.clips,
            MOST_LATENT_FRAMES: -(-self.recipe.clips // LONG_SHARE),
        }
        paths = {frames: self.work / f"latents_{frames}.safetensors" for frames in counts}
        if self._leads:
            with self._timed("latents"):
                encoder, first = read_vae(vae).encoder.to(self.device), 0
                for frames, count in counts.items():
                    if not paths[frames].exists():
                        encoded(encoder, count, (frames - 1) * 6 + 1, first).write(paths[frames])
                    first += count
        self.processes.wait_for_everyone()
        return {frames: Cache.read(path) for frames, path in paths.items()}

    def _write_card(self, measured: Measured, deviations: tuple[float, ...]) -> None:
        said = card(
            measured,
            deviations,
            self.files.megabytes,
            LICENSE,
            self.recipe.seed,
            self.times,
            self.processes.num_processes,
        )
        write_whole(self.files.card, said.encode())

    def _write_log(self, measured: Measured) -> None:
        """What decided the checkpoint, how its stages went, and what came of it."""
        stages = {name: read_metrics(self.work / name) for name in STAGES}
        said = {
            "recipe": asdict(self.recipe),
            "processes": self.processes.num_processes,
            "device": self.device.type,
            "torch": torch.__version__,
            "times": {name: asdict(spent) for name, spent in self.times.items()},
            "measured": asdict(measured),
            "stages": {name: _thinned(lines) for name, lines in stages.items()},
        }
        write_whole(self.out / LOG, json.dumps(said, indent=1).encode())

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Adds to what a stage took, over interruptions too."""
        before, started = self.times.get(name, Spent()), (time.perf_counter(), time.process_time())
        try:
            yield
        finally:
            wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
            self.times[name] = Spent(before.minutes + wall / 60, before.processor_minutes + processor / 60)
            if self._leads:
                held = {name: asdict(spent) for name, spent in self.times.items()}
                write_whole(self.work / TIMES, json.dumps(held).encode())

    @property
    def _leads(self) -> bool:
        return self.processes.is_main_process


def _thinned(lines: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The curves of a stage in fewer points, each the mean of what lies between."""
    taken = -(-len(lines) // LOGGED_POINTS) or 1
    parts = [lines[start : start + taken] for start in range(0, len(lines), taken)]
    names = [name for name in lines[0] if name not in ("step", "seconds")]
    return [
        {"step": part[-1]["step"]} | {name: round(fmean(line[name] for line in part), 5) for name in names}
        for part in parts
    ]


def read_vae(path: Path) -> VAE:
    """Both halves of a VAE's file, in float32, to be trained or used."""
    held = build.load_vae(path, dtype=torch.float32)
    if held.encoder is None or held.decoder is None:
        raise TrainingError(f"{path} has half a VAE", "both halves are needed", "Remove it to train it anew")
    vae = VAE.__new__(VAE)
    torch.nn.Module.__init__(vae)
    vae.encoder, vae.decoder = held.encoder, held.decoder
    return vae


@torch.no_grad()
def fitted_colours(vae: VAE, cache: Cache, clips: int = 48) -> LatentColours:
    """What previews show of the latents."""
    latents = cache.mean[:clips].float()
    frames = torch.cat(list(decode(vae.decoder, latents)), dim=1)
    return LatentColours.fitted(cache.statistics().to_model_space(latents), frames)


def measure(files: ModelFiles, asked: int, settings: evaluate.Settings) -> Measured:
    """The card's figures, from the files as users have them."""
    pipeline = MochiPipeline.from_files(
        dit=files.dit, vae=files.vae, t5=files.t5, tokenizer=files.tokenizer, dtype=torch.float32
    )
    generated, _ = evaluate.generation(pipeline, evaluate.held_out_captions(asked), settings)
    vae = read_vae(files.vae).eval()
    known = evaluate.reconstruction(vae.encoder, vae.decoder, asked, frames=settings.frames)
    reserved = evaluate.reconstruction(vae.encoder, vae.decoder, asked, reserved=True, frames=settings.frames)
    return Measured(generated, known, reserved, asked, settings.frames, settings.steps, settings.cfg)
