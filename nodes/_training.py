"""Where datasets, trainings and their LoRAs lie, and what the page is told of a training."""

import filecmp
import importlib.util
import math
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from mochi_core.errors import DatasetError, TrainingError
from mochi_core.training import EXAMPLE_CLIPS
from mochi_core.training.clips import VIDEO_SUFFIXES
from mochi_core.training.loop import FINAL, Step
from mochi_core.training.metrics import NAME as METRICS
from mochi_core.training.metrics import read_metrics
from mochi_core.training.sources import Source

from ._checks import quoted

EXAMPLE = "mochi-video-example"
# In the host's output folder. Its list of LoRAs has those of the last one.
DATASETS, TRAININGS, LORAS = "mochi_datasets", "mochi_training", "loras"

# What every file system takes as a name, and shows as it is.
PLAIN = re.compile(r"[^\W_](?:[\w .-]{0,78}[\w-])?")
RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
# An input folder's folders are looked through so deep.
DEEPEST = 3

# Pages are told no more often, in no more points of the curve, and of so many samples.
SECONDS_BETWEEN = 0.25
MOST_POINTS = 240
MOST_SAMPLES = 50
# The pace is that of so many steps.
PACE = 20


def check_name(name: str) -> None:
    """Raises `TrainingError` unless a name can be that of a folder and of a file, and of nothing elsewhere."""
    if not PLAIN.fullmatch(name) or RESERVED.fullmatch(name):
        raise TrainingError(
            f"name is {quoted(name)}",
            "it must be plain: letters, digits, spaces, -, _ and dots within, 80 at most, beginning with a letter "
            "or digit",
            "Use one such as my-style",
        )


def check_installed() -> None:
    """Raises `TrainingError` where a training cannot run, because what this pack asks for was not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise TrainingError(
            "accelerate is not installed", "a training runs on it", "Install what this pack's requirements.txt lists"
        )


def clip_folders(root: Path) -> list[str]:
    """The folders in `root` that hold videos, each with a slash behind it."""
    found: list[str] = []
    for here, folders, files in os.walk(root):
        name = Path(here).relative_to(root)
        folders[:] = [] if len(name.parts) == DEEPEST else sorted(f for f in folders if not f.startswith("."))
        if name.parts and any(Path(file).suffix.lower() in VIDEO_SUFFIXES for file in files):
            found.append(f"{name.as_posix()}/")
    return sorted(found)


def source_folder(name: str, root: Path) -> Path:
    """The folder of clips that is meant: the example, or one in `root`.

    Raises `DatasetError` when there is none, or no video in it has a caption.
    """
    folder = EXAMPLE_CLIPS if name == EXAMPLE else root / name
    if name == EXAMPLE and not folder.is_dir():
        raise DatasetError(
            f"folder is {EXAMPLE}, and {folder} is not there", "it comes with this pack", "Install the pack anew"
        )
    if name != EXAMPLE and name not in clip_folders(root):
        raise DatasetError(
            f"folder is {quoted(name)}",
            f"it must be a folder with videos in {root}",
            "Put clips there, each with its caption beside it (name.mp4 and name.txt), and reload the page, or choose "
            f"{EXAMPLE}, which comes with this pack",
        )
    source = Source.open(folder)
    if len(source.lone_captions) == len(source.captions):
        raise DatasetError(
            f"folder is {quoted(name)}, and none of its {len(source.videos)} videos has a caption",
            "a caption lies beside its video: name.mp4 and name.txt",
            "Write one for each; an empty file stands for no prompt",
        )
    return folder


def listing(folder: Path) -> str:
    """Changes when a file of the folder does."""
    try:
        files = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    except OSError as error:
        return str(error)
    return " ".join(f"{name}:{stat.st_mtime_ns}:{stat.st_size}" for name, stat in files)


def dataset_folder(dataset: str, output: Path) -> Path:
    """The folder that a dataset's name or path means. Raises `TrainingError` when it is not in the output folder."""
    # As it is written: what a user links into the output folder is meant to be there.
    root = output.absolute()
    folder = root / DATASETS / dataset
    if not dataset.strip() or "\0" in dataset or ".." in folder.parts or root not in folder.parents:
        raise TrainingError(
            f"dataset is {quoted(dataset)}",
            f"it must be the name of a folder in {root / DATASETS}",
            "Connect Mochi Video Prepare Dataset, or write the name that was given there",
        )
    return folder


def lora_file(name: str, output: Path) -> Path:
    return output / LORAS / f"{name}.safetensors"


def check_free(name: str, output: Path) -> None:
    """Raises `TrainingError` when the host has a LoRA of this name that is not this training's own."""
    theirs, ours = lora_file(name, output), final_file(name, output)
    if theirs.exists() and not (ours.is_file() and filecmp.cmp(theirs, ours, shallow=False)):
        raise TrainingError(
            f"There is a LoRA {theirs}, and it is not of the training called {name!r}",
            "nothing is replaced unasked",
            "Choose another name, or remove that file",
        )


def final_file(name: str, output: Path) -> Path:
    return output / TRAININGS / name / f"{FINAL}.lora.safetensors"


def published(final: Path, target: Path) -> Path:
    """Copies a finished LoRA to where the host lists it: whole, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(final, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


class Reports:
    """What the page is told of a training: all that it shows, each time, so that it may come and go.

    `output` is the host's output folder, which the page may read. The curve goes on from `folder`'s.
    """

    def __init__(
        self,
        folder: Path,
        output: Path,
        steps: int,
        send: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.output, self.steps, self.send, self.clock = output, steps, send, clock
        before = read_metrics(folder) if (folder / METRICS).exists() else []
        self.losses = {line["step"]: line["loss"] for line in before if line["step"] <= steps and "loss" in line}
        self.samples = [_file(path, output) for path in sorted((folder / "samples").glob("step_*.mp4"))]
        self.seconds: deque[float] = deque(maxlen=PACE)
        self.step = max(self.losses, default=0)
        self.rate = 0.0
        self.sent = -math.inf

    def __call__(self, done: Step) -> None:
        if done.step <= self.step:  # steps that a crash had lost
            self.losses = {step: loss for step, loss in self.losses.items() if step < done.step}
        self.step, self.rate = done.step, done.rate
        self.losses[done.step] = done.loss
        self.seconds.append(done.seconds)
        if done.sample is not None:
            shown = _file(done.sample, self.output)
            self.samples = [*(one for one in self.samples if one != shown), shown]
        if done.sample is not None or self.clock() - self.sent >= SECONDS_BETWEEN:
            self.send(self.told("running"))
            self.sent = self.clock()

    def end(self, state: str, lora: str = "") -> dict[str, Any]:
        """Tells the page how the training ended, `stopped` or `finished`; what it was told."""
        told = self.told(state, lora)
        self.send(told)
        return told

    def told(self, state: str, lora: str = "") -> dict[str, Any]:
        return {
            "state": state,
            "step": self.step,
            "steps": self.steps,
            "loss": self.losses.get(self.step),
            "rate": self.rate,
            "seconds": sum(self.seconds) / len(self.seconds) if self.seconds else 0.0,
            "curve": curve(sorted(self.losses.items())),
            "samples": self.samples[-MOST_SAMPLES:],
            "lora": lora,
        }


def curve(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The losses of a training in no more points than can be shown: each the mean of neighbours."""
    taken = math.ceil(len(losses) / MOST_POINTS) or 1
    parts = [losses[start : start + taken] for start in range(0, len(losses), taken)]
    return [(part[-1][0], round(fmean(loss for _, loss in part), 6)) for part in parts]


def _file(path: Path, output: Path) -> dict[str, Any]:
    """A sample as the page asks for it, and the step it was made at."""
    folder = path.parent.relative_to(output).as_posix()
    step = int("".join(filter(str.isdigit, path.stem)) or 0)
    return {"filename": path.name, "subfolder": folder, "type": "output", "step": step}
