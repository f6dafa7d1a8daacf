import pytest
import torch
from torch import nn

from mochi_core.vae.blocks import DownsampleBlock, UpsampleBlock, depth_to_space_time, pointwise
from mochi_core.vae.causal_conv import KeptContext, WholeClip

pytestmark = pytest.mark.usefixtures("no_gradients")


def clip(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_depth_to_space_time(goldens, dtype):
    """The reference drops the first two of three frames at once."""
    units = goldens.tensors("units")
    out = depth_to_space_time(units["in/d2st_x"].to(dtype), 3, 2)[:, :, 2:]
    goldens.check(out, units["out_f64/depth_to_space_time_3_2"], "unit/depth_to_space_time_3_2")


def test_pointwise_is_a_linear_layer_over_the_channels(randomised):
    linear = randomised(nn.Linear(3, 5))
    out = pointwise(linear, clip(2, 3, 4, 2, 2))
    assert out.shape == (2, 5, 4, 2, 2)
    torch.testing.assert_close(out[1, :, 2, 0, 1], linear(clip(2, 3, 4, 2, 2)[1, :, 2, 0, 1]))


@pytest.mark.parametrize("time, frames, out_frames", [(1, 4, 4), (2, 4, 7), (3, 4, 10), (3, 1, 1)])
def test_upsampling_drops_what_was_before_the_first_frame(randomised, time, frames, out_frames):
    block = randomised(UpsampleBlock(32, 8, 1, False, time, 2, nn))
    assert block(clip(1, 32, frames, 3, 2), WholeClip()).shape == (1, 8, out_frames, 6, 4)


def test_upsampling_drops_nothing_later_on(randomised):
    block, context = randomised(UpsampleBlock(32, 8, 1, False, 3, 2, nn)), KeptContext()
    first = block(clip(1, 32, 1, 3, 2), context)
    second = block(clip(1, 32, 1, 3, 2), context)
    assert (first.shape[2], second.shape[2]) == (1, 3)


@pytest.mark.parametrize("time, frames, out_frames", [(1, 4, 4), (2, 7, 4), (3, 10, 4), (3, 1, 1)])
@pytest.mark.parametrize("has_attention", (True, False))
def test_downsampling_is_its_counterpart(randomised, time, frames, out_frames, has_attention):
    block = randomised(DownsampleBlock(8, 32, 1, has_attention, time, 2, nn))
    assert block(clip(1, 8, frames, 6, 4), WholeClip()).shape == (1, 32, out_frames, 3, 2)
