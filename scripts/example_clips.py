"""Makes the clips that come along for a first training: 20 of a motion that the embedded model was never shown.

The same pictures each time. They lie in mochi_core/assets/example_clips, with their captions.
"""

import sys
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from mochi_core.training import EXAMPLE_CLIPS  # noqa: E402
from mochi_core.training.tiny import scenes  # noqa: E402
from mochi_core.training.tiny.scenes import Scene  # noqa: E402
from mochi_core.video_file import write_mp4  # noqa: E402

COUNT = 20
SEED = 1
# What the model knows best, so that the motion alone is new.
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = ("black", "white", "gray")


def example_scenes() -> list[Scene]:
    """What the clips show."""
    return _every()[:COUNT]


def other_scenes() -> list[Scene]:
    """The same motion with other colours, shapes and backgrounds than any of the clips has together."""
    return _every()[COUNT:]


def _every() -> list[Scene]:
    every = [
        Scene(colour, shape, background, scenes.RESERVED_MOTION)
        for colour in COLOURS
        for shape in SHAPES
        for background in BACKGROUNDS
        if colour != background
    ]
    order = np.random.default_rng(SEED).permutation(len(every))
    return [every[index] for index in order]


def main() -> None:
    EXAMPLE_CLIPS.mkdir(parents=True, exist_ok=True)
    for old in EXAMPLE_CLIPS.glob("zigzag_*"):
        old.unlink()
    chance = np.random.default_rng(SEED)
    for index, scene in enumerate(example_scenes()):
        path = EXAMPLE_CLIPS / f"{scene.motion}_{index:02d}.mp4"
        write_mp4(path, [scenes.render(scene, scenes.placed(scene, chance))])
        path.with_suffix(".txt").write_text(f"{scene.caption()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
