"""Video sizes and latent sizes: the only place that knows 6k+1 frames and multiples of 16."""

from dataclasses import dataclass

from .errors import ShapeError

FRAMES_PER_LATENT = 6
PIXELS_PER_LATENT = 8
PIXELS_PER_PATCH = 16
RELEASED_FPS = 30


@dataclass(frozen=True)
class LatentSize:
    """A clip in latent space: `frames` latent frames of `height` x `width` latent pixels."""

    frames: int
    height: int
    width: int

    @property
    def video(self) -> "VideoSize":
        return VideoSize(
            self.width * PIXELS_PER_LATENT,
            self.height * PIXELS_PER_LATENT,
            frames_of(self.frames),
        )


@dataclass(frozen=True)
class VideoSize:
    """A clip in pixels. Raises `ShapeError` when the model cannot make it."""

    width: int
    height: int
    frames: int

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            if value < PIXELS_PER_PATCH or value % PIXELS_PER_PATCH:
                raise ShapeError(
                    f"{name} is {value}",
                    f"it must be a positive multiple of {PIXELS_PER_PATCH} pixels",
                    f"Use {snap_pixels(value)}",
                )
        if self.frames < 1 or (self.frames - 1) % FRAMES_PER_LATENT:
            raise ShapeError(
                f"frames is {self.frames}",
                f"it must be 6k+1 (1, 7, 13, ..., 163): the first frame, then {FRAMES_PER_LATENT} a latent frame",
                f"Use {snap_frames(self.frames)}",
            )

    @property
    def latent(self) -> LatentSize:
        return LatentSize(
            (self.frames - 1) // FRAMES_PER_LATENT + 1,
            self.height // PIXELS_PER_LATENT,
            self.width // PIXELS_PER_LATENT,
        )


def frames_of(latent_frames: int) -> int:
    """How many frames latent frames become."""
    return (latent_frames - 1) * FRAMES_PER_LATENT + 1


def whole_frames(frames: int) -> int:
    """How many of a clip's frames, from the first on, fill latent frames: the largest 6k+1 there is."""
    return (frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1


def snap_frames(frames: float) -> int:
    """The nearest frame count of the form 6k+1, at least 1; ties go up."""
    return max(0, int((frames - 1) / FRAMES_PER_LATENT + 0.5)) * FRAMES_PER_LATENT + 1


def snap_pixels(pixels: float) -> int:
    """The nearest positive multiple of 16; ties go up."""
    return max(1, int(pixels / PIXELS_PER_PATCH + 0.5)) * PIXELS_PER_PATCH


def frames_for_seconds(seconds: float, fps: float = RELEASED_FPS) -> int:
    """The frame count, 6k+1, nearest to `seconds` at `fps`."""
    return snap_frames(seconds * fps)
