"""Colours of latents: fitted, kept in a checkpoint, and near to what the VAE would show."""

import json

import pytest
import torch

from mochi_core.errors import LatentsError, WeightsError
from mochi_core.pipeline import MochiPipeline, TextToVideo
from mochi_core.preview import LatentColours
from mochi_core.sampling.schedule import linear_quadratic
from mochi_core.shapes import VideoSize
from mochi_core.weights.build import TINY_DIT, open_dit

COLOURS = LatentColours(((1.0, 0.0, 0.0), (0.0, 0.5, 0.0)), (0.0, 0.0, -1.0))


def test_a_picture_for_each_latent_frame_by_the_linear_map() -> None:
    latents = torch.zeros(2, 3, 4, 5)
    latents[0, 1], latents[1, 2] = 1.0, 1.0
    pictures = COLOURS.pictures(latents)
    assert pictures.shape == (3, 4, 5, 3) and pictures.dtype == torch.uint8
    assert pictures[0, 0, 0].tolist() == [128, 128, 0]
    assert pictures[1, 0, 0].tolist() == [255, 128, 0]
    assert pictures[2, 0, 0].tolist() == [128, 191, 0]


def test_values_out_of_range_and_nan_are_clipped() -> None:
    latents = torch.full((2, 1, 1, 2), 100.0)
    latents[..., 0] = float("nan")
    assert COLOURS.pictures(latents)[0, 0].tolist() == [[0, 0, 0], [255, 255, 0]]


def test_fitting_finds_the_map_that_made_the_frames() -> None:
    latents = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) / 4
    small = (latents.movedim(1, -1) @ torch.tensor(COLOURS.factors) + torch.tensor(COLOURS.offset) + 1) / 2
    frames = torch.cat([small[:, :1], small[:, 1:].repeat_interleave(6, dim=1)], dim=1)
    videos = frames.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    fitted = LatentColours.fitted(latents, videos)
    assert torch.allclose(torch.tensor(fitted.factors), torch.tensor(COLOURS.factors), atol=1e-5)
    assert fitted.offset == pytest.approx(COLOURS.offset, abs=1e-5)


def test_metadata_brings_them_back() -> None:
    assert LatentColours.from_metadata(COLOURS.metadata) == COLOURS
    assert LatentColours.from_metadata({}) is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[[1, 2]]", "[[1, 2, 3]]", '["abc"]', "[[1, 2, NaN], [0, 0, 0]]", "7"]
)
def test_metadata_that_says_no_colours_is_refused(text: str) -> None:
    with pytest.raises(WeightsError, match="3"):
        LatentColours.from_metadata({"latent_colours": text})


def test_a_checkpoint_whose_colours_are_of_other_channels_has_none(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    from mochi_core.weights.checkpoint import Checkpoint

    for wrong in (COLOURS.metadata, {"latent_colours": "no"}):
        save_file(load_file(TINY_DIT), tmp_path / "dit.safetensors", {**Checkpoint(TINY_DIT).metadata, **wrong})
        assert open_dit(tmp_path / "dit.safetensors").colours is None


def test_latents_of_other_channels_are_refused() -> None:
    with pytest.raises(LatentsError, match="they must be 2 x T x H x W"):
        COLOURS.pictures(torch.zeros(12, 3, 4, 5))


def test_the_tiny_checkpoints_pictures_are_near_its_videos(tiny: MochiPipeline) -> None:
    """On a prompt that was not fitted to: what is left is a twentieth of what there is to see."""
    request = TextToVideo(
        "a yellow triangle falling on a gray background",
        size=VideoSize(64, 64, 13),
        schedule=linear_quadratic(20),
        cfg=4.0,
        seed=99,
    )
    latents = tiny.sample(request)
    colours = open_dit(TINY_DIT).colours
    assert colours is not None and len(json.loads(colours.metadata["latent_colours"])) == 13
    seen = colours.pictures(tiny.statistics.to_model_space(latents)[0]).float() / 255
    frames = torch.cat(list(tiny.decode(latents)), dim=1)[0]
    small = torch.nn.functional.avg_pool2d(frames.movedim(-1, 1), 8).movedim(1, -1)
    shown = torch.cat([small[:1], small[1:].unflatten(0, (2, 6)).mean(1)])
    assert ((seen - shown) ** 2).mean() < 0.05 * ((shown - shown.mean((0, 1, 2))) ** 2).mean()
