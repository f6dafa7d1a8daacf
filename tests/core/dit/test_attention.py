import pytest
import torch
from torch import nn

from mochi_core.config import DiTConfig
from mochi_core.dit.attention import HEAD_NORM_EPS, AsymmetricAttention
from mochi_core.dit.rope import rotations
from mochi_core.numerics import widen

pytestmark = pytest.mark.usefixtures("no_gradients")
CONFIG = DiTConfig(depth=1, heads=3, visual_dim=24, text_dim=10, text_feature_dim=8)


@pytest.mark.parametrize("suffix", ("", "_tiny"))
def test_head_norm(goldens, dtype, suffix):
    units = goldens.tensors("units")
    norm = nn.RMSNorm(16, eps=HEAD_NORM_EPS, dtype=dtype)
    norm.load_state_dict({"weight": units["in/rms_w"]})
    out = norm(widen(units[f"in/rms_x{suffix}"].to(dtype)))
    goldens.check(out, units[f"out_f64/qk_rmsnorm{suffix}"], f"unit/qk_rmsnorm{suffix}")


@pytest.fixture
def attention(randomised):
    return randomised(AsymmetricAttention(CONFIG, True, nn))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = dict(visual=(2, 12, 24), text=(2, 5, 10), visual_scale=(2, 24), text_scale=(2, 10))
    streams = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    frequencies = torch.randn(3, 3, 4, generator=generator) * 0.1
    return streams | {"rotation": rotations(frequencies, 3, 2, 2, torch.device("cpu")).table()}


def test_only_visual_tokens_are_rotated(attention, inputs):
    still = torch.ones_like(inputs["rotation"])
    turned = attention.visual_qkv(inputs["visual"], inputs["visual_scale"], inputs["rotation"])
    unturned = attention.visual_qkv(inputs["visual"], inputs["visual_scale"], still)
    assert not torch.allclose(turned.q, unturned.q) and not torch.allclose(turned.k, unturned.k)
    torch.testing.assert_close(turned.q.norm(dim=-1), unturned.q.norm(dim=-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(turned.v, unturned.v)


def test_the_joint_attention_gets_the_streams_apart(attention, inputs):
    def joint(visual, text, mask):
        assert [x.shape for x in visual] == [(2, 12, 3, 8)] * 3
        assert [x.shape for x in text] == [(2, 5, 3, 8)] * 3
        assert mask is None
        return visual.v.flatten(2), text.v.flatten(2)

    attention.joint = joint
    visual, text = attention(**inputs, text_mask=None)
    assert visual.shape == (2, 12, 24) and text.shape == (2, 5, 10)


def test_text_that_is_not_updated_is_none(randomised, inputs):
    last = randomised(AsymmetricAttention(CONFIG, False, nn))
    assert not any(name.startswith("proj_y") for name in last.state_dict())
    assert last(**inputs, text_mask=None)[1] is None
