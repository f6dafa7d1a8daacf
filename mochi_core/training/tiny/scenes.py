"""Procedural captioned clips: one coloured shape on a background, moving in one way.

A scene is four words (`Scene`); where exactly the shape is and how large (`Placement`) is drawn by chance. A tenth of
all scenes is held out by a stable hash. One shape and one motion are reserved: no training clip ever shows them, so
that a LoRA has something new to learn.

Shapes: `T H W` = frames, rows, columns. Frames are `T H W 3`, 0 to 1.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import cache

import numpy as np
import torch

from ...errors import DatasetError

SIZE = 64
FRAMES = 19
MOST_FRAMES = 25
HELD_OUT_SHARE = 10  # one scene in so many

Array = np.ndarray

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.95, 0.90, 0.10),
    "orange": (1.00, 0.50, 0.05),
    "purple": (0.55, 0.15, 0.75),
    "cyan": (0.10, 0.85, 0.90),
    "white": (1.00, 1.00, 1.00),
    "pink": (1.00, 0.60, 0.80),
}
_GRAYS = {"black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5)}
PLAIN = ("black", "white", "gray", "red", "green", "blue", "yellow")
BACKGROUNDS = (*PLAIN, "striped", "gradient")
STRIPE = 8  # rows
STRIPE_GRAYS = (0.15, 0.40)
GRADIENT_GRAYS = (0.0, 0.6)

# Words for the same thing; the first is the one prompts are usually written with.
COLOUR_WORDS: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in COLOURS},
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
SHAPE_WORDS: Mapping[str, tuple[str, ...]] = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "star": ("star",),
}
MOTION_WORDS: Mapping[str, tuple[str, ...]] = {
    "left": ("moving left", "sliding left"),
    "right": ("moving right", "sliding right"),
    "up": ("moving up", "rising"),
    "down": ("moving down", "falling"),
    "still": ("standing still", "not moving"),
    "bouncing": ("bouncing",),
    "growing": ("growing", "getting bigger"),
    "shrinking": ("shrinking", "getting smaller"),
    "diagonal": ("moving diagonally", "sliding diagonally"),
    "circling": ("circling", "going around"),
    "blinking": ("blinking", "flashing"),
    "zigzag": ("zigzagging", "moving in a zigzag"),
}
BACKGROUND_WORDS: Mapping[str, tuple[str, ...]] = {**{name: (name,) for name in BACKGROUNDS}, "gray": ("gray", "grey")}
RESERVED_SHAPE, RESERVED_MOTION = "star", "zigzag"
SHAPES, MOTIONS = tuple(SHAPE_WORDS), tuple(MOTION_WORDS)

TEMPLATES = (
    "{a} {colour} {shape} {motion} on a {background} background",
    "{a} {colour} {shape} {motion}, {background} background",
    "on a {background} background, {a} {colour} {shape} {motion}",
    "{a} {colour} {shape} is {motion} in front of a {background} background",
    "{background} background, {colour} {shape}, {motion}",
    "against a {background} background {a} {colour} {shape} is {motion}",
    "the background is {background} and {a} {colour} {shape} is {motion}",
    "a video of {a} {colour} {shape} {motion} over {background}",
)


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in one word for each thing."""

    colour: str
    shape: str
    background: str
    motion: str

    @property
    def held_out(self) -> bool:
        """Whether no training clip may show this combination."""
        digest = hashlib.sha256("|".join(astuple(self)).encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0

    @property
    def reserved(self) -> bool:
        return self.shape == RESERVED_SHAPE or self.motion == RESERVED_MOTION

    def caption(self, chance: np.random.Generator | None = None) -> str:
        """The scene in words: by chance one of many ways to say it, or the plainest."""

        def one(words: tuple[str, ...]) -> str:
            return words[0] if chance is None else words[chance.integers(len(words))]

        template, colour = one(TEMPLATES), one(COLOUR_WORDS[self.colour])
        return template.format(
            a="an" if colour[0] in "aeio" else "a",
            colour=colour,
            shape=one(SHAPE_WORDS[self.shape]),
            background=one(BACKGROUND_WORDS[self.background]),
            motion=one(MOTION_WORDS[self.motion]),
        )


@cache
def every_scene(held_out: bool) -> tuple[Scene, ...]:
    """Every combination that is, or is not, held out, the reserved included; no shape of its background's colour."""
    every = (
        Scene(colour, shape, background, motion)
        for colour in COLOURS
        for shape in SHAPES
        for background in BACKGROUNDS
        for motion in MOTIONS
        if colour != background
    )
    return tuple(scene for scene in every if scene.held_out == held_out)


@cache
def scenes(held_out: bool) -> tuple[Scene, ...]:
    """Those of `every_scene` that clips show: nothing reserved."""
    return tuple(scene for scene in every_scene(held_out) if not scene.reserved)


def parse(caption: str) -> Scene:
    """The scene that a caption tells of. Raises `DatasetError` when it lacks something, or says it in other words."""
    text = " " + re.sub(r"[^a-z ]", " ", caption.lower()) + " "
    background = next(
        (name for name in BACKGROUNDS for word in BACKGROUND_WORDS[name] if _says_ground(text, word)), None
    )
    colour = _said(text, COLOUR_WORDS, ["{} " + word for words in SHAPE_WORDS.values() for word in words])
    shape, motion = _said(text, SHAPE_WORDS), _said(text, MOTION_WORDS)
    if colour is None or shape is None or background is None or motion is None:
        raise DatasetError(
            f"The caption {caption!r} tells of {colour} {shape} {background} {motion}",
            "it must tell a shape's colour, its kind, its motion and the background",
            "Write it as in: a red circle moving right on a black background",
        )
    return Scene(colour, shape, background, motion)


def _said(text: str, words: Mapping[str, tuple[str, ...]], frames: list[str] | None = None) -> str | None:
    for name, some in words.items():
        if any(f" {frame.format(word)} " in text for word in some for frame in frames or ["{}"]):
            return name
    return None


def _says_ground(text: str, word: str) -> bool:
    return any(f" {said} " in text for said in (f"{word} background", f"background is {word}", f"over {word}"))


# Pictures


@dataclass(frozen=True)
class Placement:
    """Where a shape is when its motion is in the middle, in pixels from the picture's centre, and how large it is."""

    right: float = 0.0
    down: float = 0.0
    radius: float = 11.0


def placed(scene: Scene, chance: np.random.Generator) -> Placement:
    """By chance, and such that nothing leaves the picture."""
    reach = 3.0 if scene.motion in ("growing", "shrinking") else 6.0
    right, down = chance.uniform(-reach, reach, 2)
    # Along a path the shape keeps its place, or it would run out of the picture.
    right, down = (
        0.3 * right if scene.motion in ("left", "right", "diagonal", "circling", "zigzag") else right,
        0.3 * down if scene.motion in ("up", "down", "diagonal", "circling", "bouncing") else down,
    )
    return Placement(right, down, chance.uniform(9.5, 12.5))


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _triangle(x: Array, y: Array) -> Array:
    # Point upwards, the centre of mass at the origin.
    sides = np.maximum(y, 0.5 * math.sqrt(3) * np.abs(x) - 0.5 * y)
    return sides - 0.68


def _diamond(x: Array, y: Array) -> Array:
    return (np.abs(x) / 0.85 + np.abs(y) / 1.25 - 1) * 0.70


def _cross(x: Array, y: Array) -> Array:
    across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.maximum(across - 0.34, along - 1.08)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.85) - 0.28


def _star(x: Array, y: Array) -> Array:
    # One tenth of the five-pointed star, by its symmetry: the side from a point to the notch beside it.
    point, notch = 1.4, 0.56
    angle = np.abs((np.arctan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    distance = np.hypot(x, y)
    u, v = distance * np.cos(angle), distance * np.sin(angle)
    notch_u, notch_v = notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5)
    length = math.hypot(point - notch_u, notch_v)
    return ((u - point) * notch_v + v * (point - notch_u)) / length


# How far a point is from the shape's edge, negative inside, for a shape of radius 1 around the origin (y goes down).
OUTLINES: Mapping[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
}

SPEED = 1.25  # pixels a frame
BOUNCE, BOUNCE_FRAMES = 17.0, 9
ORBIT, ORBIT_FRAMES = 11.0, 18
ZIGZAG, ZIGZAG_FRAMES = 8.0, 12
GROWTH = 0.55  # pixels of radius a frame
SMALL, LARGE = 5.0, 15.0
BLINK_FRAMES = 5


def path(motion: str, frames: int) -> Array:
    """Where the shape's centre is in each frame, right and down of its place: `T 2`."""
    frame = np.arange(frames, dtype=np.float32)
    run = SPEED * (frame - (frames - 1) / 2)
    zero = np.zeros(frames, np.float32)
    turn = 2 * math.pi * frame / ORBIT_FRAMES
    sway = 4 * np.abs((frame / ZIGZAG_FRAMES + 0.25) % 1 - 0.5) - 1
    steps = {
        "left": (-run, zero),
        "right": (run, zero),
        "up": (zero, -run),
        "down": (zero, run),
        "bouncing": (zero, BOUNCE / 2 - BOUNCE * np.abs(np.sin(math.pi * frame / BOUNCE_FRAMES))),
        "diagonal": (0.9 * run, 0.9 * run),
        "circling": (ORBIT * np.sin(turn), -ORBIT * np.cos(turn)),
        "zigzag": (run, ZIGZAG * sway),
    }
    return np.stack(steps.get(motion, (zero, zero)), axis=1).astype(np.float32)


def radii(motion: str, frames: int, radius: float) -> Array:
    """How large the shape is in each frame, 0 where it does not show: `T`."""
    frame = np.arange(frames, dtype=np.float32)
    if motion == "growing":
        return SMALL + GROWTH * frame
    if motion == "shrinking":
        return np.maximum(LARGE - GROWTH * frame, 3.0)
    shows = (frame // BLINK_FRAMES) % 2 == 0 if motion == "blinking" else np.ones(frames, bool)
    return np.where(shows, radius, 0).astype(np.float32)


def coverage(shape: str, centres: Array, sizes: Array, height: int = SIZE, width: int = SIZE) -> Array:
    """How much of each pixel the shape covers, with soft edges: `T H W`. `centres`: `T 2` from the picture's centre."""
    rows = np.arange(height, dtype=np.float32)[None, :, None] - (height - 1) / 2
    columns = np.arange(width, dtype=np.float32)[None, None, :] - (width - 1) / 2
    size = np.maximum(sizes, 1e-3)[:, None, None]
    x = (columns - centres[:, 0, None, None]) / size
    y = (rows - centres[:, 1, None, None]) / size
    inside = np.clip(0.5 - OUTLINES[shape](x, y) * size, 0, 1)
    return np.where(sizes[:, None, None] > 0, inside, 0).astype(np.float32)


@cache
def ground(background: str, height: int = SIZE, width: int = SIZE) -> Array:
    """The background: `H W 3`."""
    rows = np.arange(height)
    if background == "striped":
        grays = np.where((rows // STRIPE) % 2 == 0, *STRIPE_GRAYS)
    elif background == "gradient":
        grays = np.interp(rows, (0, height - 1), GRADIENT_GRAYS)
    else:
        colour = np.array((COLOURS | _GRAYS)[background], np.float32)  # pyright: ignore[reportOperatorIssue]
        return np.broadcast_to(colour, (height, width, 3))
    return np.broadcast_to(grays.astype(np.float32)[:, None, None], (height, width, 3))


def render(
    scene: Scene, placement: Placement = Placement(), frames: int = FRAMES, height: int = SIZE, width: int = SIZE
) -> torch.Tensor:
    """The clip: `T H W 3`, 0 to 1."""
    centres = path(scene.motion, frames) + np.array([placement.right, placement.down], np.float32)
    inside = coverage(scene.shape, centres, radii(scene.motion, frames, placement.radius), height, width)[..., None]
    colour = np.array(COLOURS[scene.colour], np.float32)
    return torch.from_numpy(inside * colour + (1 - inside) * ground(scene.background, height, width))


@dataclass(frozen=True)
class Clip:
    """A scene with its captions and frames (`T H W 3`, 0 to 1)."""

    scene: Scene
    captions: tuple[str, ...]
    frames: torch.Tensor


def training_clip(seed: int, index: int, frames: int = FRAMES, captions: int = 1) -> Clip:
    """Clip `index` of the endless training set that `seed` names: the same whenever it is asked for."""
    chance = np.random.default_rng((seed, index))
    every = scenes(held_out=False)
    scene = every[chance.integers(len(every))]
    said = tuple(scene.caption(chance) for _ in range(captions))
    return Clip(scene, said, render(scene, placed(scene, chance), frames))
