"""What a training says of itself: a line of JSON for each step, and TensorBoard's files where that is installed."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..weights.writer import write_whole

log = logging.getLogger(__name__)

NAME = "metrics.jsonl"


class Metrics:
    """The metrics of a training's folder. Lines of steps that were lost with the process are taken out again."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = True):
        """`step` steps are done: what was written of later ones is not true any more."""
        self._path = folder / NAME
        held = read_metrics(folder) if self._path.exists() else []
        kept = [line for line in held if line["step"] <= step]
        write_whole(self._path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = _board(folder, step) if tensorboard else None

    def __call__(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(f"{json.dumps({'step': step, **values})}\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training's metrics; the last one may be broken off, and is left out then."""
    lines = []
    for line in (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed: metrics go to %s alone", folder / NAME)
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
