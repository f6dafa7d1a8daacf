"""The command line: `python -m mochi_core.cli`."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .errors import MochiError
from .weights import convert as conversion
from .weights import formats, layouts
from .weights.checkpoint import Checkpoint

app = typer.Typer(help="Mochi 1: weight files and more.", no_args_is_help=True, add_completion=False)
console, errors = Console(), Console(stderr=True)


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write weights in another layout or format, in the memory of a few tensors."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _said(), Progress(*columns, console=errors, transient=True) as bar:
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
