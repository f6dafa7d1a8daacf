"""Latents lie on disk while they are decoded, so that a decode that fails, or a host that dies, does not lose them.

The files are such as the host's Load Latent reads.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mochi_core.errors import MochiError
from mochi_core.latents_file import write_latents

log = logging.getLogger("mochi_video")

FOLDER = "latents"
NAME = "mochi_video_autosave"


@contextmanager
def autosaved(
    latents: torch.Tensor, output_folder: Path, interruptions: tuple[type[BaseException], ...]
) -> Iterator[None]:
    """Keeps `latents` in a file below the host's output folder until the block is done.

    After an error the file stays, and the error, or the log, names it. It goes when the block is done or one of
    `interruptions` ended it. Failing to write is a warning, never an error. A single picture is not kept.
    """
    path = _saved(latents, output_folder) if latents.shape[2] > 1 else None
    try:
        yield
    except interruptions:
        _delete(path)
        raise
    except MochiError as error:
        if path is not None:
            raise type(error)(error.value, error.rule, f"{error.remedy}. {_way_on(path)}") from error
        raise
    except BaseException:
        if path is not None:
            log.error("The decode failed. %s.", _way_on(path))
        raise
    _delete(path)


def _way_on(path: Path) -> str:
    return (
        f"The latents are kept in {path}: move the file to the host's input folder, reload the page and decode it "
        "again through the Load Latent node"
    )


def _saved(latents: torch.Tensor, output_folder: Path) -> Path | None:
    path = None
    try:
        path = _new_file(output_folder / FOLDER)
        write_latents(path, latents)
    except Exception as error:  # whatever it is, the decode goes on
        log.warning("The latents are not kept on disk while they are decoded: %s", error)
        _delete(path)
        return None
    return path


def _new_file(folder: Path) -> Path:
    """An empty file that nobody else has."""
    folder.mkdir(parents=True, exist_ok=True)
    number = _next_number(folder)
    while True:
        path = folder / f"{NAME}_{number:05}.latent"
        try:
            path.open("xb").close()
            return path
        except FileExistsError:
            number += 1


def _next_number(folder: Path) -> int:
    numbers = (re.match(rf"{NAME}_(\d+)\.latent", file.name) for file in folder.iterdir())
    return max((int(number[1]) for number in numbers if number), default=0) + 1


def _delete(path: Path | None) -> None:
    try:
        if path is not None:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s is no longer needed and could not be deleted: %s", path, error)
