"""Video files as clips the model can learn from: upright, square pixels, 30 frames a second, cropped to a size.

Shapes: `T H W` = frames, rows, columns.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import DatasetError
from ..shapes import RELEASED_FPS, VideoSize

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".gif", ".mkv", ".avi", ".m4v")
# What makes a video HDR: the curves called smpte2084 (PQ) and arib-std-b67 (HLG), by FFmpeg's numbers.
HDR_CURVES = {16: "PQ (smpte2084)", 18: "HLG (arib-std-b67)"}
# From here on a video that does not say its colour matrix has that of HD.
HD_HEIGHT = 720
HD_MATRIX, UNKNOWN_MATRIX = 1, 2
# Aspect ratios whose logarithms differ by less are the same one, rounded to the grid.
SAME_ASPECT = 0.03
# A picture this many times wider or narrower than a size is not cropped to it: nearly nothing would be left.
WIDEST_CROP = 4
# Times in ticks longer than this are the video's own; those in shorter ones may be off by half a tick.
LONGEST_ROUNDED_TICK = Fraction(1, 100)
# Pictures come in another order than they are shown: how long after the last one needed none of those before can come.
REORDERED = Fraction(2)
# A video that ends so many seconds before its header says it does is not whole.
MISSED = Fraction(1, 2)

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class Look:
    """What a video file shows: pixels of the upright picture, made square, and how many frames it has at 30 fps.

    `damage` says why the frames end, when that is not the end of the video.
    """

    width: int
    height: int
    frames: int
    damage: str | None = None

    @property
    def aspect(self) -> float:
        return self.width / self.height


@dataclass(frozen=True)
class Pixels:
    """Frames of a video, `T H W 3`, uint8; fewer than were asked for when the video has ended, or `damage` has."""

    frames: torch.Tensor
    damage: str | None = None


def parse_size(text: str) -> VideoSize:
    """`848x480x37` as a size. Raises `DatasetError` when it is none, `ShapeError` when the model cannot make it."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.strip().isdecimal() and len(part) < 9 for part in parts):
        raise DatasetError(
            f"The size is {text!r}", "it must be width x height x frames, such as 848x480x37", "Write it so"
        )
    return VideoSize(*map(int, parts))


def choose_size(look: Look, sizes: Sequence[VideoSize]) -> VideoSize:
    """Of the sizes whose aspect ratio is nearest to the video's, the longest one that it fills.

    Among those the largest that need not be enlarged to. Raises `DatasetError` when the video is too short for them or
    of another shape altogether.
    """
    far = min(sizes, key=lambda size: _apart(look, size))
    if _apart(look, far) > math.log(WIDEST_CROP):
        raise DatasetError(
            f"The picture is {look.width} x {look.height}",
            f"cropped to {far.width} x {far.height}, nearly nothing would be left of it",
            "Crop it yourself, or give a size of its shape",
        )
    nearest = [size for size in sizes if _apart(look, size) <= _apart(look, far) + SAME_ASPECT]
    filled = [size for size in nearest if size.frames <= look.frames]
    if not filled:
        least = min(nearest, key=lambda size: size.frames)
        raise DatasetError(
            f"It has {look.frames} frames at {RELEASED_FPS} fps",
            f"it needs {least.frames} for {least.width} x {least.height}",
            "Give a shorter size, or a longer clip",
        )

    def rank(size: VideoSize) -> tuple[int, bool, float]:
        enlarged = enlargement(look, size) > 1
        return size.frames, not enlarged, -size.width * size.height if enlarged else size.width * size.height

    return max(filled, key=rank)


def enlargement(look: Look, size: VideoSize) -> float:
    """By how much the picture is scaled so that it covers the size."""
    return max(size.width / look.width, size.height / look.height)


def left_out(look: Look, size: VideoSize) -> float:
    """The part of the picture that is cropped away."""
    return 1 - math.exp(-_apart(look, size))


def _apart(look: Look, size: VideoSize) -> float:
    return abs(math.log(look.aspect / (size.width / size.height)))


def look_at(path: Path, needed: int) -> Look:
    """Reads the first frame, and times without decoding until `needed` frames are certain.

    Raises `DatasetError` when the file is no video that can be read, or HDR.
    """
    with _opened(path) as (container, stream):
        first, times, end, damage, whole = None, set(), Fraction(0), None, True
        clock = _Clock(stream)
        try:
            for packet in container.demux(stream):
                if first is None:
                    first = next(iter(packet.decode()), None)
                if packet.size and not packet.is_discard:
                    time, duration = clock(packet)
                    times.add(time)
                    end = max(end, time + duration)
                    if first is not None and (end - min(times) - REORDERED) * RELEASED_FPS > needed:
                        whole = False
                        break
        except _errors() as error:
            damage = _words(error)
        if first is None:
            raise _unreadable(path, damage or "it has no picture")
        _refuse_hdr(path, stream, first)
        declared = stream.duration and stream.time_base and stream.duration * stream.time_base
        length = end - min(times)
        if whole and damage is None and declared and declared - length > MISSED:
            damage = f"it should be {float(declared):.1f} s long and ends after {float(length):.1f} s"
        width, height = _shown_size(first, _pixel_aspect(stream), _quarter_turns(first))
        frames = max(1, math.ceil((length - clock.tolerance) * RELEASED_FPS))
        return Look(max(1, round(width)), max(1, round(height)), frames, damage)


def read_pixels(path: Path, size: VideoSize, start: int = 0) -> Pixels:
    """The frames from the `start`-th on that a video shows at 30 fps, cropped to the size from the middle.

    One frame at a time is there in its own size. Raises `DatasetError` when none can be read.
    """
    out = torch.empty(size.frames, size.height, size.width, 3, dtype=torch.uint8)
    count, damage = 0, None
    with _opened(path) as (container, stream):
        pixel_aspect, clock = _pixel_aspect(stream), _Clock(stream)
        stream.thread_type = "AUTO"
        kept: tuple[object, torch.Tensor] | None = None
        broken = 0

        def timed() -> Iterator[tuple[Fraction, Fraction, Any]]:
            nonlocal broken
            for frame in container.decode(stream):
                broken += bool(getattr(frame, "is_corrupt", False))
                yield *clock(frame), frame

        try:
            for index, frame in enumerate(shown(timed(), clock.tolerance)):
                if index < start:
                    continue
                if kept is None or kept[0] is not frame:
                    kept = frame, _cropped(frame, size, pixel_aspect)
                out[count] = kept[1]
                count += 1
                if count == size.frames:
                    break
        except _errors() as error:
            damage = _words(error)
    if not count:
        raise _unreadable(path, damage or "its frames have ended")
    return Pixels(out[:count], damage or (f"{broken} of its frames are damaged" if broken else None))


def shown(
    timed: Iterable[tuple[Fraction, Fraction, Frame]], tolerance: Fraction, fps: int = RELEASED_FPS
) -> Iterator[Frame]:
    """Of frames with their times and durations in seconds, in order, the one that is seen at each `n / fps`.

    Time starts with the first frame. A frame that comes up to `tolerance` late counts as being there.
    """
    n, started, current, end = 0, None, None, Fraction(0)
    for time, duration, frame in timed:
        if started is None:
            started = time
        while current is not None and Fraction(n, fps) + tolerance < time - started:
            yield current
            n += 1
        current, end = frame, time - started + duration
    while current is not None and (Fraction(n, fps) + tolerance < end or n == 0):
        yield current
        n += 1


class _Clock:
    """Times and durations of a stream's packets or frames, in seconds, guessed where the file does not say them."""

    def __init__(self, stream: Any):
        rate = stream.average_rate or stream.guessed_rate
        self._tick: Fraction = stream.time_base or Fraction(1, RELEASED_FPS)
        self._usual: Fraction = 1 / Fraction(rate) if rate else Fraction(1, RELEASED_FPS)
        self._next = Fraction(0)
        self.tolerance = self._tick / 2 if self._tick <= LONGEST_ROUNDED_TICK else Fraction(0)

    def __call__(self, item: Any) -> tuple[Fraction, Fraction]:
        stamp = item.pts if item.pts is not None else item.dts
        time = self._next if stamp is None else stamp * self._tick
        duration = item.duration * self._tick if item.duration else self._usual
        self._next = time + duration
        return time, duration


def _cropped(frame: Any, size: VideoSize, pixel_aspect: Fraction) -> torch.Tensor:
    """A frame scaled to cover the size, upright, its middle: `H W 3`, uint8."""
    turns = _quarter_turns(frame)
    width, height = _shown_size(frame, pixel_aspect, turns)
    scale = max(size.width / width, size.height / height)
    upright = max(size.width, round(width * scale)), max(size.height, round(height * scale))
    stored = upright[::-1] if turns % 2 else upright
    unknown = frame.colorspace == UNKNOWN_MATRIX and frame.height >= HD_HEIGHT
    # Going smaller, swscale's bicubic filter grows with the step, so it does not alias.
    picture = frame.reformat(
        *stored, format="rgb24", interpolation="BICUBIC", src_colorspace=HD_MATRIX if unknown else None
    ).to_ndarray()
    picture = np.rot90(picture, turns)
    top, left = ((have - want) // 2 for have, want in zip(picture.shape, (size.height, size.width)))
    return torch.from_numpy(picture[top : top + size.height, left : left + size.width].copy())


def _shown_size(frame: Any, pixel_aspect: Fraction, turns: int) -> tuple[float, float]:
    """Width and height in square pixels after the turns."""
    width, height = float(frame.width * pixel_aspect), float(frame.height)
    return (height, width) if turns % 2 else (width, height)


def _quarter_turns(frame: Any) -> int:
    """How often the stored picture must be turned left to be upright, as a telephone writes it down."""
    return round(frame.rotation / 90) % 4


def _pixel_aspect(stream: Any) -> Fraction:
    aspect = stream.sample_aspect_ratio
    return Fraction(aspect) if aspect else Fraction(1)


def _refuse_hdr(path: Path, stream: Any, frame: Any) -> None:
    curves = {getattr(frame, "color_trc", None), stream.codec_context.color_trc} & HDR_CURVES.keys()
    if curves:
        raise DatasetError(
            f"{path.name} is HDR, {HDR_CURVES[curves.pop()]}",
            "the model knows the colours of ordinary video (BT.709)",
            "Convert it with tone mapping, for example with FFmpeg's zscale and tonemap filters",
        )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The file and its main video stream. Raises `DatasetError` when there is none."""
    import av  # only reading videos needs it

    try:
        container = av.open(str(path))
    except (*_errors(), OSError) as error:
        raise _unreadable(path, _words(error)) from error
    with container:
        stream: Any = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise _unreadable(path, "there is no video in it")
        yield container, stream


def _errors() -> tuple[type[Exception], ...]:
    import av.error

    # What a damaged header says of sizes and rates comes as ValueError.
    return av.error.FFmpegError, ValueError


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).rstrip(".")


def _unreadable(path: Path, why: str) -> DatasetError:
    return DatasetError(
        f"{path.name} cannot be read ({why})", "it must be a whole video", "Get it again, or convert it to MP4"
    )
