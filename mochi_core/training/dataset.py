"""A prepared dataset: the manifest, and the latents and features of its clips.

Shapes: `C t h w` = channels, latent frames, latent rows, latent columns; `L C` = tokens, feature width.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import DatasetError, MochiError, WeightsError
from ..latents import LatentStatistics
from ..shapes import VideoSize
from ..text.tokenizer import MAX_TOKENS
from ..weights.files import SafetensorsFile
from ..weights.writer import write_whole

MANIFEST, CLIPS = "manifest.json", "clips"
FORMAT, VERSION = "mochi-video dataset", 1
# The names of a clip's file: letters that every file system takes, and a part that no two clips share.
FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}-[0-9a-f]{16}\.safetensors")
# By how much, relatively, statistics may differ that went through a file of float32.
STATISTICS_ROUNDED = 1e-4
REMEDY = "Prepare the dataset again, into a new folder"

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Clip:
    """One entry of a dataset. `name` is its source's, with the first frame when that is not 0."""

    name: str
    size: VideoSize
    caption: str
    file: Path


@dataclass(frozen=True)
class Sample:
    """What training reads of a clip: the posterior in VAE space, `C t h w`, float32, and its caption's features, `L C`.

    The empty caption has no features: `L` is 0.
    """

    name: str
    mean: torch.Tensor
    logvar: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a clip.

    `start` is its first frame at 30 fps. `video` and `caption_hash` are sha256 of the source, `latents_of` and
    `features_of` identify all that the tensors were made of; `features_of` is empty while there are no features.
    `warnings` are of the video, `cut` of the caption.
    """

    source: str
    start: int
    width: int
    height: int
    frames: int
    video: str
    caption: str
    caption_hash: str
    latents_of: str
    features_of: str
    file: str
    file_hash: str
    warnings: tuple[str, ...] = ()
    cut: str = ""

    @property
    def name(self) -> str:
        return clip_name(self.source, self.start)

    @property
    def size(self) -> VideoSize:
        return VideoSize(self.width, self.height, self.frames)


@dataclass(frozen=True)
class Manifest:
    """All that `manifest.json` says. `options` and `models` are for people, the rest is read again."""

    options: Mapping[str, Any]
    models: Mapping[str, str]
    statistics: LatentStatistics
    text_width: int
    clips: tuple[Entry, ...]

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_whole(folder / MANIFEST, json.dumps(values, indent=1, ensure_ascii=False).encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises `DatasetError` when there is none, or with values that `prepare` never writes."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DatasetError(
                f"{path} cannot be read ({error})",
                "a dataset is a folder that `prepare` has written",
                "Choose its folder, or prepare the clips first",
            ) from error
        try:
            return cls._checked(values)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DatasetError(
                f"{path} is damaged ({_words(error)})", "it must be as `prepare` wrote it", REMEDY
            ) from error

    @classmethod
    def _checked(cls, values: Any) -> "Manifest":
        said = _value(values, "format", str), _value(values, "version", int)
        if said != (FORMAT, VERSION):
            raise ValueError(f"it is {said[0]!r} version {said[1]}, not {FORMAT!r} version {VERSION}")
        numbers = _value(values, "statistics", dict)
        metadata = {f"latents_{name}": json.dumps(_value(numbers, name, list)) for name in ("mean", "std")}
        clips = tuple(_entry(clip) for clip in _value(values, "clips", list))
        if len({clip.file for clip in clips}) < len(clips) or len({clip.name for clip in clips}) < len(clips):
            raise ValueError("two clips have one name")
        return cls(
            _value(values, "options", dict),
            _value(values, "models", dict),
            LatentStatistics.from_metadata(metadata),
            _value(values, "text_width", int),
            clips,
        )


@dataclass(frozen=True)
class Dataset:
    """What `prepare` has written, opened for training. `digest` changes when what is learnt from changes."""

    folder: Path
    clips: tuple[Clip, ...]
    statistics: LatentStatistics
    text_width: int
    digest: str

    @classmethod
    def open(cls, folder: str | Path) -> "Dataset":
        """Raises `DatasetError` when the folder holds no dataset, an unfinished one, or one that was tampered with."""
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if not manifest.clips:
            raise DatasetError(f"{folder} has no clip", "there must be one to learn from", "Prepare some")
        unfinished = [entry.name for entry in manifest.clips if not entry.features_of]
        if unfinished:
            raise DatasetError(
                f"{len(unfinished)} of {len(manifest.clips)} clips in {folder}, such as {unfinished[0]}, lack features",
                "preparing must have come to its end",
                "Run `prepare` again: it goes on where it stopped",
            )
        gone = [entry.name for entry in manifest.clips if not (folder / CLIPS / entry.file).is_file()]
        if gone:
            raise DatasetError(
                f"The files of {len(gone)} clips in {folder / CLIPS} are missing, such as that of {gone[0]}",
                "every clip of the manifest must have its file",
                "Run `prepare` again: it makes what is missing",
            )
        ordered = sorted(manifest.clips, key=lambda entry: (entry.source, entry.start))
        clips = (Clip(entry.name, entry.size, entry.caption, folder / CLIPS / entry.file) for entry in ordered)
        learnt = [asdict(manifest.statistics), [(entry.name, entry.latents_of, entry.features_of) for entry in ordered]]
        digest = hashlib.sha256(json.dumps(learnt).encode()).hexdigest()
        return cls(folder, tuple(clips), manifest.statistics, manifest.text_width, digest)

    def check(self, channels: int, text_width: int, statistics: LatentStatistics) -> None:
        """Raises `DatasetError` unless a model of so many latent channels, with this T5 and VAE, can learn from it."""
        if len(self.statistics.mean) != channels:
            raise DatasetError(
                f"{self.folder} has latents of {len(self.statistics.mean)} channels",
                f"this model makes {channels}",
                "Prepare the clips with the VAE that belongs to the model",
            )
        if self.text_width != text_width:
            raise DatasetError(
                f"{self.folder} has captions' features of width {self.text_width}",
                f"this model reads {text_width}",
                "Prepare the clips with the T5 that belongs to the model",
            )
        ours, theirs = (s.mean + s.std for s in (self.statistics, statistics))
        if not all(
            math.isclose(a, b, rel_tol=STATISTICS_ROUNDED, abs_tol=STATISTICS_ROUNDED) for a, b in zip(ours, theirs)
        ):
            raise DatasetError(
                f"{self.folder} was prepared with a VAE of other latent statistics",
                "the model must know the latents it is shown",
                "Prepare the clips with the VAE that belongs to the model",
            )

    def load(self, clip: Clip) -> Sample:
        """Raises `DatasetError`, which names the clip, when its file is not what `prepare` wrote."""
        mean, logvar, features = read_tensors(clip.file, clip.name, ("mean", "logvar", "features"))
        latent = clip.size.latent
        shape = (len(self.statistics.mean), latent.frames, latent.height, latent.width)
        for name, tensor in (("mean", mean), ("logvar", logvar)):
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise _damaged(
                    clip.name, f"its {name} is {tuple(tensor.shape)}, {tensor.dtype}, not {shape} in float32"
                )
        if features.ndim != 2 or len(features) > MAX_TOKENS or features.shape[1] != self.text_width:
            shown = tuple(features.shape)
            raise _damaged(clip.name, f"its features are {shown}, not at most {MAX_TOKENS} of width {self.text_width}")
        for name, tensor in (("mean", mean), ("logvar", logvar), ("features", features)):
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise _damaged(clip.name, f"its {name} has values that are no finite numbers")
        return Sample(clip.name, mean, logvar, features)


def clip_name(source: str, start: int) -> str:
    return f"{source} from frame {start}" if start else source


def read_tensors(file: Path, clip: str, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """Tensors of a clip's file, in memory of their own. Raises `DatasetError` when it has others."""
    try:
        content = SafetensorsFile(file)
        missing = set(names) - set(content.names)
        if missing:
            raise _damaged(clip, f"its file has no {', '.join(sorted(missing))}")
        return tuple(content.tensor(name).clone() for name in names)
    except (WeightsError, OSError) as error:
        raise _damaged(clip, f"{file.name} is no whole file of tensors") from error


def _entry(values: Any) -> Entry:
    kinds = {"start": int, "width": int, "height": int, "frames": int, "warnings": list}
    found = {name: _value(values, name, kinds.get(name, str)) for name in Entry.__dataclass_fields__}
    entry = Entry(**{**found, "warnings": tuple(map(str, found["warnings"]))})
    if not FILE_NAME.fullmatch(entry.file):
        raise ValueError(f"the file name {entry.file!r} is none that `prepare` gives")
    if entry.start < 0:
        raise ValueError(f"{entry.source} starts at frame {entry.start}")
    VideoSize(entry.width, entry.height, entry.frames)  # raises when the model cannot make it
    return entry


def _value(values: Any, name: str, kind: type[Kind]) -> Kind:
    """A value of a JSON object. Raises `TypeError` or `KeyError` when it is missing or of another kind."""
    if not isinstance(values, dict):
        raise TypeError(f"there is {type(values).__name__} where {name!r} should be")
    if type(values[name]) is not kind:
        raise TypeError(f"{name} is {type(values[name]).__name__}, not {kind.__name__}")
    return values[name]


def _words(error: Exception) -> str:
    if isinstance(error, MochiError):
        return f"{error.value}: {error.rule}"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _damaged(clip: str, why: str) -> DatasetError:
    return DatasetError(
        f"The clip {clip} is damaged ({why})", "it must be as `prepare` wrote it", "Run `prepare` again"
    )
