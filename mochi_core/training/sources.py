"""What a folder of videos and captions can become: which clip of which video, in which size, and what identifies it.

Nothing here needs a network.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import DatasetError
from ..shapes import VideoSize
from ..weights.identity import digest_of, sha256_of
from .clips import VIDEO_SUFFIXES, Look, choose_size, look_at
from .dataset import clip_name

# Part of what latents are made of: to be raised when the same video would give others.
PROCESSING = 1
LONGEST_CAPTION = 1 << 16


@dataclass(frozen=True)
class PrepareOptions:
    """What clips become: one of `sizes` each, and as many as `clips_per_video` that follow each other in one video."""

    sizes: tuple[VideoSize, ...]
    clips_per_video: int = 1

    def __post_init__(self) -> None:
        if not self.sizes:
            raise DatasetError(
                "No size is given", "clips must become one of some sizes", "Give one, such as 848x480x37"
            )
        if self.clips_per_video < 1:
            raise DatasetError(f"{self.clips_per_video} clips of each video", "there must be at least 1", "Use 1")


@dataclass(frozen=True)
class ClipPlan:
    """A clip to be: where it comes from, what it becomes, and what identifies that."""

    video: Path
    start: int
    look: Look
    size: VideoSize
    video_hash: str
    caption: str
    latents_of: str
    features_of: str

    @property
    def key(self) -> tuple[str, int]:
        return self.video.name, self.start

    @property
    def name(self) -> str:
        return clip_name(*self.key)


@dataclass(frozen=True)
class Source:
    """A folder's videos, and its captions by file name."""

    folder: Path
    videos: tuple[Path, ...]
    captions: Mapping[str, Path]

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """Raises `DatasetError` when there is no video."""
        try:
            files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
        except OSError as error:
            raise DatasetError(
                f"{folder} cannot be read ({error.strerror})", "clips come from a folder", "Choose a folder"
            ) from error
        videos = tuple(path for path in files if path.suffix.lower() in VIDEO_SUFFIXES)
        if not videos:
            raise DatasetError(
                f"{folder} has no video",
                f"clips must be files that end in {', '.join(VIDEO_SUFFIXES)}",
                "Put videos there, each with its caption: name.mp4 and name.txt",
            )
        return cls(folder, videos, {path.name: path for path in files if path.suffix.lower() == ".txt"})

    @property
    def lone_captions(self) -> list[str]:
        """The captions that no video has the name of."""
        stems = {video.stem for video in self.videos}
        return [name for name, path in self.captions.items() if path.stem not in stems]

    def plans(self, video: Path, options: PrepareOptions, models: Mapping[str, str], dtype: str) -> Iterator[ClipPlan]:
        """What a video becomes; `models` identify the `vae`, the `t5` and the `tokenizer`.

        Raises `DatasetError` when it can become nothing, and `OSError` as reading does.
        """
        caption = self._caption(video)
        look = look_at(video, options.clips_per_video * max(size.frames for size in options.sizes))
        size, video_hash = choose_size(look, options.sizes), sha256_of(video)
        features_of = digest_of(caption, models["t5"], models["tokenizer"], dtype)
        for number in range(min(options.clips_per_video, look.frames // size.frames)):
            start = number * size.frames
            latents_of = digest_of(PROCESSING, video_hash, start, asdict(size), models["vae"], dtype)
            yield ClipPlan(video, start, look, size, video_hash, caption, latents_of, features_of)

    def _caption(self, video: Path) -> str:
        """A video's caption. Raises `DatasetError` when there is none that can be read."""
        names = [name for name, path in self.captions.items() if path.stem == video.stem]
        if not names:
            raise DatasetError(
                f"{video.name} has no caption",
                f"it must lie beside it as {video.stem}.txt",
                "Write one; an empty file stands for no prompt",
            )
        content = self.captions[min(names)].read_bytes()
        try:
            if len(content) > LONGEST_CAPTION:
                raise ValueError(f"it has {len(content)} bytes")
            return content.decode("utf-8-sig").strip()
        except ValueError as error:
            raise DatasetError(
                f"The caption {min(names)} cannot be read ({error})", "it must be a short text in UTF-8", "Save it so"
            ) from error
