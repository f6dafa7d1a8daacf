import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from mochi_core.attention import sdpa
from mochi_core.attention.kernels import TOLERANCE
from mochi_core.attention.reference import attend as reference

pytestmark = pytest.mark.usefixtures("no_gradients")
CUDNN, FLASH, EFFICIENT, MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
needs_priority = pytest.mark.skipif(not sdpa.HAS_PRIORITY, reason="this torch has no priority of backends")


@pytest.mark.parametrize("precision", sorted(TOLERANCE, key=str))
def test_one_sample_at_a_time_is_the_mask(inputs, mask, precision):
    q, k, v = inputs(precision)
    by_sample = sdpa.attend(q, k, v, mask)
    assert by_sample.dtype == precision
    with_mask = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(by_sample, with_mask, rtol=0, atol=TOLERANCE[precision])
    wide = [x.double() for x in (q, k, v)]
    torch.testing.assert_close(by_sample.double(), reference(*wide, mask), rtol=0, atol=TOLERANCE[precision])


def test_one_sample_at_a_time_gives_torch_no_mask(monkeypatch, inputs, mask):
    q, k, v = inputs(torch.float32)
    fused, lengths = F.scaled_dot_product_attention, []

    def without_mask(q, k, v):
        lengths.append(k.shape[2])
        return fused(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", without_mask)
    sdpa.attend(q, k, v, mask)
    assert lengths == mask.sum(1).tolist()


@needs_priority
@pytest.mark.parametrize(
    "capability, order",
    (
        ((8, 0), [FLASH, EFFICIENT, MATH]),
        ((8, 9), [FLASH, EFFICIENT, MATH]),
        ((9, 0), [CUDNN, FLASH, EFFICIENT, MATH]),
        ((12, 0), [CUDNN, FLASH, EFFICIENT, MATH]),
    ),
)
def test_the_capability_chooses_the_backends(monkeypatch, capability, order):
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda backends, set_priority: (backends, set_priority))
    assert sdpa.in_order(capability) == (order, True)


@needs_priority
def test_backends_are_as_before_afterwards(inputs, mask):
    q, k, v = inputs(torch.float32)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa.in_order((8, 6)):
        assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
        inside = sdpa.attend(q, k, v, mask)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.equal(inside, sdpa.attend(q, k, v, mask))


def test_other_devices_and_old_torch_keep_torchs_own_choice(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("no order can be set here")

    monkeypatch.setattr(sdpa, "sdpa_kernel", refuse)
    with sdpa.in_order(None):
        pass
    monkeypatch.setattr(sdpa, "HAS_PRIORITY", False)
    with sdpa.in_order((9, 0)):
        pass
