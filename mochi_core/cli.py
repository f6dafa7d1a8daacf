"""The command line: `python -m mochi_core.cli`."""

import logging
import shlex
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .errors import MochiError
from .latents_file import read_latents, write_latents
from .sampling.guidance import RELEASED_SCALE
from .sampling.schedule import RELEASED_STEPS, linear_quadratic
from .shapes import VideoSize, frames_of
from .weights import convert as conversion
from .weights import formats, layouts
from .weights.build import TINY_VAE, load_decoder
from .weights.checkpoint import Checkpoint
from .weights.files import Unchanged

app = typer.Typer(help="Mochi 1: weight files and more.", no_args_is_help=True, add_completion=False)
KINDS = ("cuda", "xpu", "mps", "cpu")
console, errors = Console(), Console(stderr=True)


Gigabytes = Annotated[float | None, typer.Option(help="Device memory to use, in GB; by default, what is free.")]
Device = Annotated[str, typer.Option(help="Where to compute: cuda, xpu, mps or cpu; auto takes the first there is.")]
Width = Annotated[int, typer.Option(help="Pixels, a multiple of 16.")]
Height = Annotated[int, typer.Option(help="Pixels, a multiple of 16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Frames = Annotated[int, typer.Option(help="6k+1; 163 are 5.4 seconds.")]


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)])


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A weight file or folder, in any layout and format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors file, or a folder.")],
    layout: Annotated[str, typer.Option(help=f"How weights are named: {', '.join(conversion.LAYOUTS)}.")] = "comfy",
    format: Annotated[str, typer.Option(help=f"How they are stored: {', '.join(conversion.FORMATS)}.")] = "keep",
    part: Annotated[
        str | None, typer.Option(help=f"Only this of an all-in-one file: {', '.join(conversion.PARTS)}.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write weights in another layout or format, in the memory of a few tensors."""
    with _said(), _bar() as bar:
        task = bar.add_task("converting")
        written = conversion.convert(
            source,
            target,
            layout,
            format,
            part,
            overwrite,
            lambda name, done, total: bar.update(task, completed=done, total=total),
        )
    for file in written:
        console.print(f"{file} ({file.stat().st_size / 1e6:.1f} MB)", soft_wrap=True, highlight=False, markup=False)


@app.command()
def inspect(source: Annotated[Path, typer.Argument(metavar="FILE", help="A weight file or folder.")]) -> None:
    """Say what a weight file holds: which networks, how named, how stored."""
    with _said():
        checkpoint = Checkpoint(source)
        table = Table("part", "named as", "behind", "weights", "stored as")
        for part in layouts.PARTS:
            found = part.found_in(checkpoint.names)
            if found is not None:
                held = layouts.read(checkpoint, found)
                stored = ", ".join(f"{count} {kind}" for kind, count in sorted(formats.kinds(held).items()))
                table.add_row(part.title, found.layout.title, found.prefix, str(len(held)), stored)
        if not table.row_count:
            layouts.find(checkpoint, layouts.DIT)  # raises, and says what it is instead
    console.print(table)


@app.command()
def plan(
    width: Width = 848,
    height: Height = 480,
    frames: Frames = 163,
    budget: Gigabytes = None,
    device: Device = "auto",
) -> None:
    """Say how the released model in bfloat16 would make a video in a budget: what is resident, streamed, in chunks."""
    from .memory.plan import Networks  # slow to import, as is all that knows the networks

    with _said():
        policy = _policy(device, budget, must_be_here=budget is None)
        made = policy.plan(VideoSize(width, height, frames), Networks.released())
    console.print(str(made), soft_wrap=True, highlight=False, markup=False)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="An .mp4 file.")],
    dit: Annotated[Path | None, typer.Option(help="The transformer's file or folder.")] = None,
    vae: Annotated[Path | None, typer.Option(help="The VAE's, with a decoder.")] = None,
    t5: Annotated[Path | None, typer.Option(help="The text encoder's.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json or spiece.model.")] = None,
    negative: Annotated[str, typer.Option(help="What to stay away from.")] = "",
    width: Width = 848,
    height: Height = 480,
    frames: Frames = 163,
    steps: Annotated[int, typer.Option(help="Fewer are faster and rougher.")] = RELEASED_STEPS,
    cfg: Annotated[float, typer.Option(help="How far to follow the prompt.")] = RELEASED_SCALE,
    seed: Annotated[int, typer.Option(help="The same seed, size and files give the same video.")] = 0,
    budget: Gigabytes = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Make a video. Without files, with the small checkpoint that comes along: 64 x 64, 7 to 25 frames.

    The latents are saved beside the video until it is written: `decode` goes on from there.
    """
    from .pipeline import MochiPipeline, TextToVideo

    given = dict(dit=dit, vae=vae, t5=t5, tokenizer=tokenizer)
    with _said():
        is_tiny = _none_given(given, "four")
        kept = target.with_suffix(".latent")
        _check_target(target, overwrite)
        _check_free(kept, overwrite)
        memory = _policy(device, budget)
        size = VideoSize(width, height, frames)
        request = TextToVideo(prompt, negative, size, linear_quadratic(steps), cfg, seed)
        files: Any = given
        pipeline = MochiPipeline.tiny(memory=memory) if is_tiny else MochiPipeline.from_files(**files, memory=memory)
        errors.print(str(pipeline.plan(request)), soft_wrap=True, highlight=False, markup=False)
        with _bar() as bar:
            task = bar.add_task("sampling", total=steps)
            latents = pipeline.sample(request, lambda step, total, preview=None: bar.update(task, completed=step))
        write_latents(kept, latents)
        try:
            _write(target, pipeline.decode(latents), frames)
        except BaseException:
            again = ["decode", str(kept), str(target), *(["--vae", str(vae)] if vae else []), "--device", device]
            errors.print(f"The latents are kept: {shlex.join(again)}", soft_wrap=True, highlight=False, markup=False)
            raise
        kept.unlink()


@app.command()
def decode(
    source: Annotated[Path, typer.Argument(metavar="LATENTS", help="What `generate` or ComfyUI's Save Latent wrote.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="An .mp4 file.")],
    vae: Annotated[Path | None, typer.Option(help="A VAE with a decoder; by default, the small checkpoint's.")] = None,
    budget: Gigabytes = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Make a video of saved latents."""
    from .pipeline import decode as decoded

    with _said():
        _check_target(target, overwrite)
        latents = read_latents(source)
        if len(latents) != 1:
            raise MochiError(f"{source} holds {len(latents)} videos", "it must be one", "Save them one by one")
        memory = _policy(device, budget)
        file = vae or TINY_VAE
        unchanged, decoder = Unchanged(file), load_decoder(file)
        _write(target, decoded(decoder, latents, memory, unchanged), frames_of(latents.shape[2]))


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder of videos, each with its caption: .txt.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The dataset's folder: new, or prepared before.")],
    size: Annotated[
        list[str] | None,
        typer.Option(help="What clips become, width x height x frames; several times for several shapes or lengths."),
    ] = None,
    clips_per_video: Annotated[int, typer.Option(help="How many clips a long video may give, one after another.")] = 1,
    vae: Annotated[Path | None, typer.Option(help="The VAE's file or folder, with an encoder.")] = None,
    t5: Annotated[Path | None, typer.Option(help="The text encoder's.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json or spiece.model.")] = None,
    budget: Gigabytes = None,
    device: Device = "auto",
) -> None:
    """Encode videos and captions for training. Without files, with the small checkpoint that comes along.

    What an earlier run has done, whole or interrupted, is not done again. By default clips become 848x480x37, and
    64x64x19 for the small checkpoint.
    """
    from .training import prepare as preparing
    from .training.clips import parse_size

    given = dict(vae=vae, t5=t5, tokenizer=tokenizer)
    with _said():
        is_tiny = _none_given(given, "three")
        sizes = tuple(parse_size(text) for text in size or ["64x64x19" if is_tiny else "848x480x37"])
        options, memory = preparing.PrepareOptions(sizes, clips_per_video), _policy(device, budget)
        files: Any = given
        models = preparing.PrepareModels.tiny(memory) if is_tiny else preparing.PrepareModels(**files, memory=memory)
        with _bar() as bar:
            task = bar.add_task("preparing")

            def progress(step: int, total: int, preview: torch.Tensor | None = None) -> None:
                bar.update(task, completed=step, total=total)

            report = preparing.prepare(source, target, options, models, progress)
    console.print(str(report), soft_wrap=True, highlight=False, markup=False)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; Genmo's lora.yaml is understood too.")],
    dataset: Annotated[Path | None, typer.Option(help="What `prepare` made, in the place of the file's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where everything goes, in the place of the file's.")] = None,
    steps: Annotated[int | None, typer.Option(help="How many, in the place of the file's.")] = None,
    vae: Annotated[Path | None, typer.Option(help="The VAE's file, for samples.")] = None,
    t5: Annotated[Path | None, typer.Option(help="The text encoder's, for samples.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json or spiece.model, for samples.")] = None,
) -> None:
    """Train a LoRA, or a small model. Stopped, by ctrl-C or SIGTERM, it is saved; run again, it goes on.

    For several GPUs: `torchrun --nproc_per_node 2 -m mochi_core.cli train CONFIG`.
    """
    from .training import config as configuring
    from .training import trainer
    from .training.loop import Step

    given = {"dataset": dataset, "output": output, "steps": steps}
    files = {name: str(path) for name, path in (("vae", vae), ("t5", t5), ("tokenizer", tokenizer)) if path is not None}
    overrides: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items() if value is not None
    }
    with _said():
        settings, notes = configuring.read_config(config, **overrides, **({"model": files} if files else {}))
        for note in notes:
            errors.print(note, soft_wrap=True, highlight=False, markup=False)
        with _bar() as bar:
            task = bar.add_task("training", total=settings.steps)

            def watch(done: Step) -> None:
                bar.update(task, completed=done.step, description=f"loss {done.loss:.4f}")
                if done.sample is not None:
                    bar.print(str(done.sample))

            try:
                with _stopped_by_sigterm():
                    written = trainer.train(settings, watch)
            except KeyboardInterrupt:
                said = f"Stopped, and saved in {settings.output}: the same command goes on from there"
                errors.print(said, soft_wrap=True, highlight=False, markup=False)
                raise typer.Exit(130) from None
    console.print(str(written), soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM, which is how schedulers stop what they run, ends the block as ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _none_given(files: dict[str, Path | None], count: str) -> bool:
    """Whether no model file is given. Raises `MochiError` when some are."""
    missing = [name for name, path in files.items() if path is None]
    if 0 < len(missing) < len(files):
        raise MochiError(
            f"--{', --'.join(missing)} not given", f"all {count} files belong to a model", "Give them all, or none"
        )
    return bool(missing)


def _check_target(target: Path, overwrite: bool) -> None:
    """Whether a video can be written there, found out before the work."""
    if target.suffix.lower() != ".mp4":
        raise MochiError(f"OUT is {target}", "it must end in .mp4", f"Use {target.with_suffix('.mp4')}")
    _check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=target.parent).close()


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise MochiError(f"{path} exists", "nothing is replaced unasked", "Choose another name, or add --overwrite")


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors, transient=True)


def _write(target: Path, pieces: Iterator[torch.Tensor], frames: int) -> None:
    """Writes a video's pieces, `1 T H W 3`, as they come."""
    from .video_file import write_mp4

    with _bar() as bar:
        task = bar.add_task("decoding", total=frames)

        def reported() -> Iterator[torch.Tensor]:
            for piece in pieces:
                yield piece[0]
                bar.advance(task, piece.shape[1])

        count = write_mp4(target, reported())
    console.print(f"{target} ({count} frames)", soft_wrap=True, highlight=False, markup=False)


def _policy(device: str, gigabytes: float | None, *, must_be_here: bool = True) -> Any:
    from .memory.plan import MemoryPolicy

    return MemoryPolicy(_device(device, must_be_here), None if gigabytes is None else gigabytes * 1e9)


def _device(name: str, must_be_here: bool) -> str:
    """The device called so, or the first there is for `auto`. Raises `MochiError` when it is not here but must be."""
    here = [kind for kind in KINDS[:-1] if getattr(torch, kind, None) and _backend(kind).is_available()]
    known = (*here, "cpu") if must_be_here else KINDS
    if name != "auto" and name.partition(":")[0] not in known:
        raise MochiError(f"--device is {name}", f"there are {', '.join(known)}", "Choose one of them, or auto")
    return name if name != "auto" else (*here, "cpu")[0]


def _backend(kind: str) -> Any:
    return torch.backends.mps if kind == "mps" else getattr(torch, kind)


class _said:
    """Turns an error of ours into a message and exit code 1."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MochiError | OSError):
            errors.print("error:", style="red", end=" ")
            errors.print(str(error), soft_wrap=True, highlight=False, markup=False)
            raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
