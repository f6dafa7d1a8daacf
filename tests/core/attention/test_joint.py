import pytest
import torch

from mochi_core.attention.joint import QKV, PlainJointAttention
from mochi_core.attention.reference import attend
from mochi_core.errors import KernelError

pytestmark = pytest.mark.usefixtures("no_gradients")
MASK = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])


def stream(tokens, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return QKV(*(torch.randn(batch, tokens, 3, 4, generator=generator) for _ in range(3)))


def one_by_one(visual, text, mask):
    """Each sample alone, its real tokens only, by the formula."""
    visual_outs = []
    for index, row in enumerate(mask):
        parts = zip(visual, text)
        q, k, v = (torch.cat([a[index], b[index][row]]).transpose(0, 1)[None] for a, b in parts)
        visual_outs.append(attend(q, k, v)[0].transpose(0, 1).flatten(1)[: visual.q.shape[1]])
    return torch.stack(visual_outs)


@pytest.mark.parametrize("kernel", ("auto", "reference", "sdpa"))
def test_every_token_sees_all_visual_and_all_real_text_tokens(kernel):
    visual, text = stream(7, 0), stream(5, 1)
    visual_out, text_out = PlainJointAttention(kernel)(visual, text, MASK)
    assert visual_out.shape == (2, 7, 12) and text_out.shape == (2, 5, 12)
    torch.testing.assert_close(visual_out, one_by_one(visual, text, MASK), rtol=0, atol=1e-6)


def test_no_mask_is_a_mask_of_true():
    visual, text = stream(7, 0), stream(5, 1)
    for masked, unmasked in zip(
        PlainJointAttention()(visual, text, torch.ones(2, 5, dtype=torch.bool)),
        PlainJointAttention()(visual, text, None),
    ):
        torch.testing.assert_close(masked, unmasked, rtol=0, atol=1e-6)


def test_masked_text_has_no_influence_and_stays_finite():
    visual, text = stream(7, 0), stream(5, 1)
    changed = QKV(*(torch.where(MASK[:, :, None, None], x, 1e4) for x in text))
    visual_out, text_out = PlainJointAttention()(visual, changed, MASK)
    assert torch.equal(visual_out, PlainJointAttention()(visual, text, MASK)[0])
    assert text_out.isfinite().all()


def test_no_text_at_all():
    visual, text = stream(7, 0), stream(0, 1)
    visual_out, text_out = PlainJointAttention()(visual, text, None)
    assert text_out.shape == (2, 0, 12)
    expected = one_by_one(visual, text, torch.ones(2, 0, dtype=torch.bool))
    torch.testing.assert_close(visual_out, expected, rtol=0, atol=1e-6)


def test_unknown_kernel():
    with pytest.raises(KernelError, match="attention is 'magic'"):
        PlainJointAttention("magic")(stream(2, 0), stream(1, 1), None)
