import pytest

from mochi_core.errors import ShapeError
from mochi_core.shapes import (
    LatentSize,
    VideoSize,
    frames_for_seconds,
    frames_of,
    snap_frames,
    snap_pixels,
    whole_frames,
)


@pytest.mark.parametrize(
    "video, latent",
    [
        (VideoSize(848, 480, 163), LatentSize(28, 60, 106)),
        (VideoSize(64, 48, 19), LatentSize(4, 6, 8)),
        (VideoSize(16, 16, 1), LatentSize(1, 2, 2)),
    ],
)
def test_video_and_latent_sizes_belong_together(video, latent):
    assert video.latent == latent
    assert latent.video == video


@pytest.mark.parametrize(
    "frames, nearest", [(26, 25), (0, 1), (-5, 1), (2, 1), (5, 7), (164, 163), (1_000_000, 1_000_003)]
)
def test_frames_must_be_6k_plus_1(frames, nearest):
    with pytest.raises(ShapeError, match=rf"^frames is {frames}: it must be 6k\+1 .*\. Use {nearest}\.$"):
        VideoSize(64, 64, frames)


@pytest.mark.parametrize("side", ("width", "height"))
@pytest.mark.parametrize("pixels, nearest", [(0, 16), (-16, 16), (8, 16), (100, 96), (104, 112), (850, 848)])
def test_width_and_height_must_be_multiples_of_16(side, pixels, nearest):
    size = {"width": 64, "height": 64, side: pixels}
    with pytest.raises(ShapeError, match=rf"^{side} is {pixels}: .* multiple of 16 pixels\. Use {nearest}\.$"):
        VideoSize(**size, frames=7)


@pytest.mark.parametrize("frames, snapped", [(-9, 1), (1, 1), (3, 1), (4, 7), (7, 7), (160, 163), (160.4, 163)])
def test_snap_frames_goes_to_the_nearest_ties_up(frames, snapped):
    assert snap_frames(frames) == snapped


@pytest.mark.parametrize("pixels, snapped", [(-9, 16), (0, 16), (24, 32), (23.9, 16), (480, 480), (1080, 1088)])
def test_snap_pixels_goes_to_the_nearest_ties_up(pixels, snapped):
    assert snap_pixels(pixels) == snapped


def test_snapped_values_are_always_valid():
    for value in range(-20, 300):
        VideoSize(snap_pixels(value), snap_pixels(value), snap_frames(value))


@pytest.mark.parametrize("seconds, fps, frames", [(5.4, 30, 163), (1, 24, 25), (0, 30, 1)])
def test_frames_for_seconds(seconds, fps, frames):
    assert frames_for_seconds(seconds, fps) == frames


@pytest.mark.parametrize("latent_frames, frames", [(1, 1), (2, 7), (28, 163)])
def test_frames_of_latent_frames(latent_frames, frames):
    assert frames_of(latent_frames) == frames
    assert LatentSize(latent_frames, 2, 2).video.frames == frames


@pytest.mark.parametrize("frames, whole", [(1, 1), (6, 1), (7, 7), (8, 7), (168, 163), (169, 169)])
def test_frames_that_fill_latent_frames(frames, whole):
    assert whole_frames(frames) == whole
