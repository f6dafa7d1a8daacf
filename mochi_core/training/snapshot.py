"""A training as it stands, in one file that is whole or not there at all.

It holds the learnt parameters, their average, the optimiser's state, and how many steps were done. Chance needs
nothing: it comes from the seed and the step (`draws`), and so do the order of the clips and the rate.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError, WeightsError
from ..weights.files import TYPE_NAMES, SafetensorsFile
from ..weights.writer import Output, write_safetensors

FOLDER = "snapshots"
NAME = re.compile(r"step_(\d+)\.safetensors")
VERSION = 1


@dataclass(frozen=True)
class Snapshot:
    """`tensors` by `<part>/<name>`: parameters, average and optimiser; `numbers` is what of the latter is no tensor."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    numbers: Mapping[str, Any]
    fingerprint: Mapping[str, Any]

    def part(self, name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{name}/"): held for key, held in self.tensors.items() if key.startswith(f"{name}/")}


def write_snapshot(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Writes a snapshot into a training's folder, then removes all but the newest `keep`, and parts that a crash left.

    Whatever fails, disk full included, the older ones are still there.
    """
    path = folder / FOLDER / f"step_{snapshot.step:08d}.safetensors"
    outputs = [
        Output(name, TYPE_NAMES[tensor.dtype], tuple(tensor.shape), partial(_on_cpu, tensor))
        for name, tensor in snapshot.tensors.items()
    ]
    said = dict(version=VERSION, step=snapshot.step, numbers=snapshot.numbers, fingerprint=snapshot.fingerprint)
    write_safetensors(path, outputs, {"snapshot": json.dumps(said)})
    for old in snapshots(folder)[: -max(keep, 1)]:
        if old != path:
            old.unlink(missing_ok=True)
    for part in path.parent.glob(".step_*.part"):
        part.unlink(missing_ok=True)
    return path


def snapshots(folder: Path) -> list[Path]:
    """The snapshots of a training's folder, the oldest first."""
    found = [path for path in (folder / FOLDER).glob("*.safetensors") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:].split(".")[0]))


def newest(folder: Path) -> Snapshot | None:
    """The newest snapshot, None when there is none. Raises `TrainingError` when it cannot be read."""
    found = snapshots(folder)
    return _read(found[-1]) if found else None


def _read(path: Path) -> Snapshot:
    try:
        file = SafetensorsFile(path)
        said = json.loads(file.metadata["snapshot"])
        if said["version"] != VERSION:
            raise ValueError(f"it is of version {said['version']}")
        # Copies: a mapped file would stay open, and be written to.
        tensors = {name: file.tensor(name).clone() for name in file.names}
        return Snapshot(int(said["step"]), tensors, dict(said["numbers"]), dict(said["fingerprint"]))
    except (WeightsError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"The snapshot {path} cannot be read ({error})",
            "it must be one that this version wrote",
            "Remove it to go on from the one before, or begin anew in another folder",
        ) from error


def check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises `TrainingError`, which says what changed, unless a training goes on with the settings it began with."""
    before, now = dict(_flat(json.loads(json.dumps(saved)))), dict(_flat(json.loads(json.dumps(wanted))))
    changed = [
        f"{name} was {before.get(name, 'not there')!r} and is {now.get(name, 'not there')!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise TrainingError(
            f"{folder} holds a training with other settings: {'; '.join(changed[:6])}",
            "one that goes on must have the settings that it began with",
            "Change them back, or choose another folder for a new training",
        )


def _flat(values: Any, name: str = "") -> Any:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, values


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()
