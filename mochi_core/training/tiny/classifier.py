"""What a clip shows, told from its pixels by geometry alone: nothing here was trained.

The background is the one whose picture fits the border of the frames best; what differs from it is the shape. Its
colour is the nearest by name, its kind the one whose outline overlaps it best, and its motion the one whose path its
centre follows.

Shapes: `T H W` = frames, rows, columns; frames are `T H W 3`, 0 to 1.
"""

from functools import cache

import numpy as np
import torch

from .scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Array, Scene, coverage, ground, path

BORDER = 3  # pixels, where shapes rarely are
FRAMES_LOOKED_AT = 6
VISIBLE = 0.25  # of the largest area
STILL = 1.2  # pixels around the mean place
GROWN = 1.2  # times the area from the first third to the last, for each six frames or so
SEARCHED_SIZES = (0.9, 0.95, 1.0, 1.05, 1.1)


def classify(frames: torch.Tensor) -> Scene:
    """The scene that is nearest to what the frames (`T H W 3`) show; every word is told, however unlikely."""
    video = frames.detach().to("cpu", torch.float32).numpy()
    background = _background(video)
    colour, inside = _shape_of(video, background)
    return Scene(colour, _kind(inside), background, _motion(inside))


def _background(video: Array) -> str:
    height, width = video.shape[1:3]
    border = np.ones((height, width), bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    edge = video[:, border]

    def misfit(name: str) -> float:
        # Half of the border at least is free of the shape.
        return float(np.median(np.abs(edge - ground(name, height, width)[border]).sum(-1)))

    patterned = {name: misfit(name) for name in BACKGROUNDS}
    return min(patterned, key=lambda name: patterned[name])


def _shape_of(video: Array, background: str) -> tuple[str, Array]:
    """The shape's colour, and how much of each pixel (`T H W`) it covers."""
    empty = ground(background, *video.shape[1:3])
    difference = video - empty
    strength = np.linalg.norm(difference, axis=-1)
    threshold = max(0.25, 0.6 * float(np.quantile(strength, 0.98)))
    seen = video[strength >= min(threshold, float(strength.max()))]
    mean = np.median(seen, axis=0)
    names = list(COLOURS)
    distances = [float(np.linalg.norm(mean - np.array(COLOURS[name]))) for name in names]
    colour = names[int(np.argmin(distances))]
    direction = mean - empty
    inside = (difference * direction).sum(-1) / np.maximum((direction**2).sum(-1), 1e-3)
    return colour, np.clip((np.clip(inside, 0, 1) - 0.15) / 0.7, 0, 1)


def _centres(inside: Array) -> tuple[Array, Array]:
    """Areas in pixels (`T`) and centres (`T 2`, right and down of the picture's centre)."""
    height, width = inside.shape[1:]
    area = inside.sum((1, 2))
    total = np.maximum(area, 1e-6)
    right = (inside * (np.arange(width) - (width - 1) / 2)).sum((1, 2)) / total
    down = (inside * (np.arange(height) - (height - 1) / 2)[:, None]).sum((1, 2)) / total
    return area, np.stack([right, down], axis=1)


@cache
def _unit(shape: str) -> tuple[float, Array]:
    """The area of the shape of radius 1, and where its centre of mass is."""
    area, centre = _centres(coverage(shape, np.zeros((1, 2), np.float32), np.array([20.0], np.float32)))
    return float(area[0]) / 400, centre[0] / 20


def _kind(inside: Array) -> str:
    area, centres = _centres(inside)
    largest = np.argsort(area, kind="stable")[-FRAMES_LOOKED_AT:]
    scores = {}
    for shape in SHAPES:
        unit, offset = _unit(shape)
        sizes = np.sqrt(np.maximum(area[largest], 1) / unit).astype(np.float32)
        overlaps = []
        for scale in SEARCHED_SIZES:
            own = coverage(shape, centres[largest] - offset * sizes[:, None] * scale, sizes * scale, *inside.shape[1:])
            seen = inside[largest]
            overlaps.append(float(np.minimum(own, seen).sum() / np.maximum(own, seen).sum()))
        scores[shape] = max(overlaps)
    return max(scores, key=lambda shape: scores[shape])


def _motion(inside: Array) -> str:
    area, centres = _centres(inside)
    frames = len(area)
    visible = area > VISIBLE * area.max()
    change = area[1:] / np.maximum(area[:-1], 1e-6)
    if not visible.all() and (change.min() < 0.4 or change.max() > 2.5) and _switches(visible) and area.max() > 0:
        return "blinking"
    third = max(1, frames // 3)
    grown = float(area[-third:].mean() / max(area[:third].mean(), 1e-6))
    least = GROWN ** (frames / 6)
    if grown > least:
        return "growing"
    if grown < 1 / least:
        return "shrinking"
    where = centres - centres.mean(0)
    if float(np.sqrt((where**2).sum(1).mean())) < STILL:
        return "still"
    misfits = {}
    for motion in MOTIONS:
        own = path(motion, frames)
        own = own - own.mean(0)
        strength = float((own**2).sum())
        if strength:
            scale = np.clip(float((own * where).sum()) / strength, 0.4, 1.6)
            misfits[motion] = float(((where - scale * own) ** 2).sum())
    return min(misfits, key=lambda motion: misfits[motion])


def _switches(visible: Array) -> bool:
    """Whether the shape goes away at once and not little by little, as a shrinking one does."""
    return bool(np.any(visible[1:] != visible[:-1]))
