"""One process at a time writes to a folder; the lock ends with the process, however that ends."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import MochiError

log = logging.getLogger(__name__)

NAME = ".lock"


@contextmanager
def locked(folder: Path, error: type[MochiError]) -> Iterator[None]:
    """The folder, made if it is not there, belongs to this block as long as it runs.

    Raises `error` when it belongs to another. Where a file system knows no locks there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("ab") as file:
        try:
            _lock(file)
        except (BlockingIOError, PermissionError) as taken:
            raise error(
                f"{folder} is being written to by another process",
                "only one at a time can",
                "Wait for it, stop it, or choose another folder",
            ) from taken
        except OSError as unknown:
            log.warning("%s cannot be locked (%s): see that nothing else writes there", folder, unknown)
        yield


def _lock(file: BinaryIO) -> None:
    """Raises `BlockingIOError` or `PermissionError` when another has it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
