"""`python -m mochi_core.training.tiny make|evaluate`."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler

from ...errors import MochiError
from ...weights import build
from ..loop import Step
from .card import Measured
from .files import ModelFiles

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()
SAID_EVERY = 50
Result = TypeVar("Result")


@app.command()
def make(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; an interrupted one goes on there.")],
    minutes: Annotated[float, typer.Option(help="About how long it may take on two cores.")] = 75.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
) -> None:
    """The tiny checkpoint from nothing. On two cores start two processes, as `make tiny` does."""
    from .make import USUAL_MINUTES, Recipe
    from .make import make as made

    _prepare()

    def watch(done: Step) -> None:
        if done.step % SAID_EVERY == 0:
            console.print(f"step {done.step} of {done.steps}: loss {done.loss:.4f}, {done.seconds:.2f} s a step")

    measured = _said(lambda: made(out, Recipe().scaled(minutes / USUAL_MINUTES), watch, device))
    if measured is not None:
        _show(measured)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="Folder with the four files.")] = build.TINY_DIT.parent,
    captions: Annotated[int, typer.Option(help="How many held-out captions.")] = 200,
    steps: int = 30,
    cfg: float = 4.0,
    frames: int = 19,
) -> None:
    """The figures of a checkpoint's card, measured again."""
    from .evaluate import Settings
    from .make import measure

    _prepare()
    _show(_said(lambda: measure(ModelFiles(model), captions, Settings(frames, steps, cfg))))


def _said(work: Callable[[], Result]) -> Result:
    try:
        return work()
    except MochiError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error


def _prepare() -> None:
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    # Threads of processes side by side would stand in each other's way.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1"))))


def _show(measured: Measured) -> None:
    for title, shares in (
        ("Videos of held-out captions", measured.generation),
        ("Clips through the VAE", measured.vae),
        ("Reserved ones through the VAE", measured.reserved),
    ):
        said = (f"{name} {share:.1f} dB" if name == "psnr" else f"{name} {share:.1%}" for name, share in shares.items())
        console.print(f"{title}: {', '.join(said)}")


if __name__ == "__main__":
    app()
