import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mochi_core.vae.causal_conv import KeptContext, WholeClip, causal_conv3d, run_causal

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
        context.next_piece()
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


def test_the_context_keeps_copies(conv):
    """Activations are changed in place after a convolution has seen them."""
    context, piece, later = KeptContext(), clip(3), clip(2) + 1
    run_causal(conv, piece, context)
    piece.fill_(1000)
    context.next_piece()
    whole = run_causal(conv, torch.cat([clip(3), later], dim=2), WholeClip())
    torch.testing.assert_close(run_causal(conv, later, context), whole[:, :, 3:], rtol=0, atol=1e-6)


def test_the_context_keeps_no_more_than_it_needs(conv):
    """A view would hold on to the whole piece."""
    context = KeptContext()
    run_causal(conv, clip(50), context)
    (kept,) = context._kept.values()
    assert kept.shape[2] == 2
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_only_the_first_piece_starts_the_clip():
    context = KeptContext()
    assert context.is_first and WholeClip.is_first
    context.next_piece()
    assert not context.is_first


@pytest.mark.parametrize("kernel, frames, out_frames", [((1, 2, 2), 5, 5), ((2, 2, 2), 5, 3), ((3, 2, 2), 7, 3)])
def test_strided_convolutions_see_the_first_frame_alone(randomised, kernel, frames, out_frames):
    conv = randomised(causal_conv3d(nn, 2, 2, kernel, strided=True))
    x = clip(frames, 4, 6)
    out = run_causal(conv, x, WholeClip())
    assert out.shape == (2, 2, out_frames, 2, 3)
    repeated_first = x[:, :, :1].expand(-1, -1, kernel[0], -1, -1)
    torch.testing.assert_close(out[:, :, :1], conv(repeated_first))
