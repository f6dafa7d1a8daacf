"""Procedural clips: the same each time, said in words that mean them, told apart by their pixels."""

import numpy as np
import pytest
import torch

from mochi_core.errors import DatasetError
from mochi_core.training.tiny import scenes
from mochi_core.training.tiny.classifier import classify


def test_a_clip_is_the_same_whenever_it_is_asked_for():
    first, again = scenes.training_clip(3, 14, captions=2), scenes.training_clip(3, 14, captions=2)
    assert first.scene == again.scene and first.captions == again.captions
    assert torch.equal(first.frames, again.frames)
    assert first.frames.shape == (19, 64, 64, 3) and first.frames.min() >= 0 and first.frames.max() <= 1
    assert not torch.equal(first.frames, scenes.training_clip(3, 15).frames)


def test_no_training_clip_is_held_out_or_reserved():
    shown = scenes.scenes(held_out=False)
    assert not any(scene.held_out or scene.reserved for scene in shown)
    assert 0.07 < len(scenes.scenes(held_out=True)) / len(shown) < 0.15
    assert all(scene.colour != scene.background for scene in shown)
    # Every word is there in training, though not every combination.
    for aspect, count in (("colour", 9), ("shape", 6), ("background", 9), ("motion", 11)):
        assert len({getattr(scene, aspect) for scene in shown}) == count


def test_what_is_held_out_never_changes():
    """Or a model's figures would be of clips that another one was trained on."""
    assert len(scenes.scenes(held_out=True)) == 515
    assert scenes.Scene("red", "circle", "black", "right").held_out
    assert not scenes.Scene("green", "triangle", "black", "up").held_out


def test_captions_mean_what_they_say():
    chance = np.random.default_rng(0)
    every = scenes.every_scene(held_out=False)
    for place in chance.integers(len(every), size=300):
        assert scenes.parse(every[place].caption(chance)) == every[place]
    assert every[0].caption() == every[0].caption()


def test_a_caption_without_a_background_is_refused():
    with pytest.raises(DatasetError, match="a red ball rising"):
        scenes.parse("a red ball rising")


@pytest.mark.parametrize("frames", [7, 19, 25])
@pytest.mark.parametrize("motion", scenes.MOTIONS)
def test_the_classifier_tells_every_motion(motion, frames):
    scene = scenes.Scene("cyan", "square", "gray", motion)
    assert classify(scenes.render(scene, frames=frames)) == scene


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_the_classifier_tells_every_shape(shape):
    for motion in ("growing", "circling"):
        scene = scenes.Scene("orange", shape, "striped", motion)
        assert classify(scenes.render(scene)) == scene


def test_the_classifier_tells_every_colour_on_every_background():
    chance = np.random.default_rng(1)
    for colour in scenes.COLOURS:
        for background in scenes.BACKGROUNDS:
            if colour != background:
                scene = scenes.Scene(colour, "triangle", background, "still")
                assert classify(scenes.render(scene, scenes.placed(scene, chance), frames=7)) == scene


def test_the_classifier_bears_a_little_noise():
    scene = scenes.Scene("yellow", "star", "blue", "zigzag")
    noise = torch.randn(19, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    assert classify(scenes.render(scene) + 0.05 * noise) == scene
