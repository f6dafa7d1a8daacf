"""What tests of training share: clips, and the dataset that the embedded model makes of them."""

import pytest
import torch

from mochi_core.shapes import VideoSize
from mochi_core.training.prepare import PrepareModels, PrepareOptions, prepare
from mochi_core.video_file import write_mp4

SIZE = VideoSize(64, 64, 13)
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


def square(colour, frames=13):
    """A square that moves right on black: `T H W 3`."""
    video = torch.zeros(frames, 64, 64, 3)
    for frame in range(frames):
        video[frame, 24:44, 6 + 2 * frame : 26 + 2 * frame] = torch.tensor(COLOURS[colour]).float()
    return video


@pytest.fixture(scope="session")
def prepared_clips(tmp_path_factory):
    """A prepared folder of three clips of 13 frames."""
    source, target = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("prepared") / "dataset"
    for colour in COLOURS:
        write_mp4(source / f"{colour}.mp4", [square(colour)])
        (source / f"{colour}.txt").write_text(f"a {colour} square moving right on a black background")
    report = prepare(source, target, PrepareOptions((SIZE,)), PrepareModels.tiny())
    assert len(report.prepared) == 3 and not report.skipped
    return target
