import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mochi_core.vae.causal_conv import KeptContext, OnDevice, WholeClip, causal_conv3d, framed, run_causal

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def conv(randomised):
    return randomised(causal_conv3d(nn, 2, 3, (3, 3, 3), strided=False))


def clip(frames, height=4, width=5):
    return torch.randn(2, 2, frames, height, width, generator=torch.Generator().manual_seed(0))


def in_pieces(layers, x, size):
    """Both layers, one after the other, over pieces of `size` frames."""
    context, outs = KeptContext(), []
    for piece in x.split(size, dim=2):
        for layer in layers:
            piece = run_causal(layer, piece, context)
        outs.append(piece)
    return torch.cat(outs, dim=2)


def test_it_is_a_convolution_after_repeating_edges(conv):
    x = clip(4)
    padded = F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
    torch.testing.assert_close(run_causal(conv, x, WholeClip()), conv(padded))


def test_later_frames_have_no_influence(conv):
    x = clip(6)
    changed = x.clone()
    changed[:, :, 4:] = 100
    before, after = run_causal(conv, x, WholeClip()), run_causal(conv, changed, WholeClip())
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4], after[:, :, 4])


@pytest.mark.parametrize("size", (1, 2, 3, 7))
def test_pieces_give_the_whole(conv, randomised, size):
    second = randomised(causal_conv3d(nn, 3, 2, (3, 3, 3), strided=False))
    whole = run_causal(second, run_causal(conv, clip(7), WholeClip()), WholeClip())
    torch.testing.assert_close(in_pieces([conv, second], clip(7), size), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("frames", (1, 2, 3, 50))
def test_the_context_keeps_no_more_than_it_needs(conv, frames):
    """A view would hold on to the whole piece."""
    store = OnDevice()
    run_causal(conv, clip(frames), KeptContext(store))
    kept = store.take(conv)
    assert sum(piece.shape[2] for piece in kept) == 2
    storages = {piece.untyped_storage().data_ptr(): piece.untyped_storage().nbytes() for piece in kept}
    assert sum(storages.values()) == min(2, frames) * clip(1).nbytes


def test_only_the_first_piece_starts_the_clip(conv):
    context = KeptContext()
    assert [context.first_time(conv) for _ in range(3)] == [True, False, False]
    assert [WholeClip().first_time(conv) for _ in range(2)] == [True, True]


@pytest.mark.parametrize("height", (1, 2, 5))
@pytest.mark.parametrize("rows", (1, 2, 3, 4))
def test_bands_of_rows_give_the_whole_frames(conv, rows, height):
    x = clip(3, height, 7)
    values_of_a_row = 2 * 2 * (3 + 2) * 7
    banded = run_causal(conv, x, KeptContext(values_at_once=rows * values_of_a_row))
    torch.testing.assert_close(banded, run_causal(conv, x, WholeClip()), rtol=0, atol=1e-6)


def test_a_band_is_no_larger_than_asked(conv):
    seen = []
    handle = conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[3]))
    run_causal(conv, clip(3, 7, 5), KeptContext(values_at_once=2 * (2 * 2 * (3 + 2) * 5)))
    handle.remove()
    assert seen == [2 + 2, 2 + 2, 2 + 2, 1 + 2]


@pytest.mark.parametrize("edge", [(1, 1), (0, 1), (1, 0), (2, 3)])
def test_what_is_framed_repeats_its_outermost_pixels(edge):
    first, second = clip(1), clip(2)
    whole = F.pad(torch.cat([first, second], dim=2), (edge[1], edge[1], edge[0], edge[0], 0, 0), mode="replicate")
    assert torch.equal(framed([first, second], 0, 4, edge), whole)
    assert torch.equal(framed([first, second], 1, 3, edge), whole[..., 1 : 3 + 2 * edge[0], :])


def test_what_is_framed_is_channels_last():
    assert framed([clip(2)], 0, 4, (1, 1)).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("kernel, frames, out_frames", [((1, 2, 2), 5, 5), ((2, 2, 2), 5, 3), ((3, 2, 2), 7, 3)])
def test_strided_convolutions_see_the_first_frame_alone(randomised, kernel, frames, out_frames):
    conv = randomised(causal_conv3d(nn, 2, 2, kernel, strided=True))
    x = clip(frames, 4, 6)
    out = run_causal(conv, x, WholeClip())
    assert out.shape == (2, 2, out_frames, 2, 3)
    repeated_first = x[:, :, :1].expand(-1, -1, kernel[0], -1, -1)
    torch.testing.assert_close(out[:, :, :1], conv(repeated_first))


@pytest.mark.parametrize("kernel, steps", [((1, 2, 2), (1, 3, 2)), ((2, 2, 2), (1, 4, 2)), ((3, 2, 2), (1, 3, 6))])
def test_strided_convolutions_in_whole_steps_give_the_whole(randomised, kernel, steps):
    conv, context = randomised(causal_conv3d(nn, 2, 2, kernel, strided=True)), KeptContext()
    x = clip(sum(steps), 4, 6)
    pieces = torch.cat([run_causal(conv, piece, context) for piece in x.split(steps, dim=2)], dim=2)
    torch.testing.assert_close(pieces, run_causal(conv, x, WholeClip()), rtol=0, atol=1e-6)
