"""One file that says all of a training.

Read with `read_config`; the reference's `lora.yaml` is understood too (`reference_config`). Paths are as the command
line would take them: relative ones from the current folder.
"""

import dataclasses
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..attention.kernels import check_name
from ..sampling.guidance import RELEASED_SCALE, constant, parse_schedule
from ..sampling.schedule import RELEASED_STEPS, RELEASED_THRESHOLD, SigmaSchedule, linear_quadratic
from ..shapes import VideoSize
from ..weights.formats import QUANTIZED
from .loop import LoopOptions
from .lora import LoraOptions
from .objective import NoiseLevels
from .optimizer import OptimizerOptions
from .reference_config import is_reference, translated
from .settings import checked, read_yaml, settings

TINY = "tiny"
KINDS = ("lora", "full")
BASES = ("keep", *QUANTIZED)
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class ModelFiles:
    """The files of the model; `dit: tiny` is the embedded one with all its parts.

    The VAE, the T5 and the tokenizer are for samples alone: a training without samples needs none of them. `base` is
    how the frozen weights are held: as the file has them, or in fewer bits.
    """

    dit: str = TINY
    vae: str | None = None
    t5: str | None = None
    tokenizer: str | None = None
    base: str = "keep"
    dtype: str = "bf16"
    attention: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        checked("model.base", self.base in BASES, self.base, f"one of {', '.join(BASES)}", "Use keep")
        checked("model.dtype", self.dtype in DTYPES, self.dtype, f"one of {', '.join(DTYPES)}", "Use bf16")
        check_name(self.attention)
        has_gradients = self.attention != "sage"
        checked("model.attention", has_gradients, self.attention, "a kernel that has gradients", "Use auto")


@dataclass(frozen=True)
class Data:
    """Which clips of the dataset, how many at once, and in what noise.

    `caption_dropout` is the part of the clips that are shown without their caption, as the null prompt, which keeps
    guidance working. `single_clip` trains on the first clip alone, to see whether anything is learnt.
    """

    batch_size: int = 1
    caption_dropout: float = 0.1
    noise_levels: NoiseLevels = NoiseLevels()
    single_clip: bool = False

    def __post_init__(self) -> None:
        checked("data.batch_size", self.batch_size >= 1, self.batch_size, "1 or more", "Use 1")
        dropout = self.caption_dropout
        checked("data.caption_dropout", 0 <= dropout <= 1, dropout, "from 0 to 1", "Use 0.1")


@dataclass(frozen=True)
class Memory:
    """What is kept on the device and what is computed again.

    Nothing given: `budget` gigabytes, by default what is free, decide. `qkv`, `feed_forward`, `post_attention` and
    `blocks` are how many blocks compute that part, or all of themselves, once more for their gradients;
    `resident_blocks` how many keep their weights on the device, the others being streamed.
    """

    budget: float | None = None
    qkv: int | None = None
    feed_forward: int | None = None
    post_attention: int | None = None
    blocks: int | None = None
    resident_blocks: int | None = None

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            checked(f"memory.{one.name}", value is None or value >= 0, value, "0 or more", "Leave it out")

    @property
    def by_hand(self) -> bool:
        """Whether anything is said that a plan would say."""
        said = (self.qkv, self.feed_forward, self.post_attention, self.blocks, self.resident_blocks)
        return any(value is not None for value in said)


@dataclass(frozen=True)
class Samples:
    """Videos of these prompts beside each other, every so many steps (0: never)."""

    every: int = 0
    prompts: tuple[str, ...] = ()
    negative: str = ""
    width: int = 848
    height: int = 480
    frames: int = 37
    steps: int = RELEASED_STEPS
    threshold: float = RELEASED_THRESHOLD
    linear_steps: int | None = None
    cfg: float = RELEASED_SCALE
    cfg_schedule: str | None = None
    seed: int = 12345

    def __post_init__(self) -> None:
        checked("samples.every", self.every >= 0, self.every, "0 (never) or more", "Use 200")
        checked("samples.prompts", bool(self.prompts) or not self.every, self.prompts, "one or more", "Add a prompt")
        if self.every:
            # All of them raise what cannot be, before a model is loaded.
            _ = self.size, self.scales

    @property
    def size(self) -> VideoSize:
        return VideoSize(self.width, self.height, self.frames)

    @property
    def schedule(self) -> SigmaSchedule:
        return linear_quadratic(self.steps, threshold=self.threshold, linear_steps=self.linear_steps)

    @property
    def scales(self) -> tuple[float, ...]:
        steps = self.schedule.steps
        return constant(self.cfg, steps) if self.cfg_schedule is None else parse_schedule(self.cfg_schedule, steps)


@dataclass(frozen=True)
class TrainingConfig:
    """A training: of which `dataset` (a prepared folder), to which `output` folder, and how.

    `kind` is `lora`, or `full` for all weights of a small model. Raises `TrainingError` and its kin on what cannot be.
    """

    dataset: str
    output: str
    kind: str = "lora"
    steps: int = 2000
    seed: int = 0
    accumulation: int = 1
    grad_clip: float = 1.0
    ema: float = 0.0
    save_every: int = 200
    keep: int = 2
    tensorboard: bool = True
    device: str = "auto"
    model: ModelFiles = field(default_factory=ModelFiles)
    data: Data = field(default_factory=Data)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(warmup=200))
    memory: Memory = field(default_factory=Memory)
    samples: Samples = field(default_factory=Samples)

    def __post_init__(self) -> None:
        checked("kind", self.kind in KINDS, self.kind, f"one of {', '.join(KINDS)}", "Use lora")
        checked("seed", 0 <= self.seed < 2**63, self.seed, "from 0 to 2**63 - 1", "Use 0")
        full_of_floats = self.kind != "full" or (self.model.base == "keep" and self.model.dtype == "fp32")
        checked(
            "model of a full training",
            full_of_floats,
            f"{self.model.base}, {self.model.dtype}",
            "keep, fp32: what is learnt must be floats that small steps can change",
            "Set model.dtype to fp32, or train a LoRA",
        )
        in_place = self.kind != "full" or self.memory.resident_blocks is None
        checked(
            "memory.resident_blocks of a full training",
            in_place,
            self.memory.resident_blocks,
            "left out: weights that learn are not streamed",
            "Remove it",
        )
        _ = self.loop  # raises what cannot be

    @property
    def loop(self) -> LoopOptions:
        """What the loop is told."""
        return LoopOptions(
            steps=self.steps,
            accumulation=self.accumulation,
            grad_clip=self.grad_clip,
            ema=self.ema,
            save_every=self.save_every,
            sample_every=self.samples.every,
            keep=self.keep,
            optimizer=self.optimizer,
            tensorboard=self.tensorboard,
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers beside the loop's options and the dataset, for those who go on."""
        model = {name: value for name, value in asdict(self.model).items() if name in ("base", "dtype")}
        kept = {"seed": self.seed, "kind": self.kind, "model": model, "data": asdict(self.data)}
        return {**kept, "lora": asdict(self.lora)} if self.kind == "lora" else kept


def read_config(path: str | Path, **overrides: Any) -> tuple[TrainingConfig, tuple[str, ...]]:
    """The configuration of a YAML file, and notes on what of the reference's was left out.

    `overrides` are keys of the top that count instead of the file's; a mapping among them, its keys instead of those.
    Raises `TrainingError` and its kin, which name the key.
    """
    values, notes = read_yaml(path), ()
    if is_reference(values):
        values, notes = translated(values)
    for name, value in overrides.items():
        held = values.get(name)
        values = {**values, name: {**held, **value} if isinstance(held, dict) and isinstance(value, dict) else value}
    return settings(TrainingConfig, values), notes
