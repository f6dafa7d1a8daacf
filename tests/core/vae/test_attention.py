import pytest
import torch
from torch import nn

from mochi_core.vae import attention
from mochi_core.vae.attention import TemporalAttentionBlock

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def units(goldens):
    return goldens.tensors("units")


@pytest.fixture
def block(units, dtype):
    block, prefix = TemporalAttentionBlock(64, nn, dtype=dtype), "w/vae_attn/"
    block.load_state_dict({k.removeprefix(prefix): v for k, v in units.items() if k.startswith(prefix)})
    return block


@pytest.mark.parametrize("frames, suffix", [(4, ""), (1, "_t1")])
def test_against_the_reference(goldens, units, dtype, block, frames, suffix):
    out = block(units["in/vae_attn_x"][:, :, :frames].to(dtype))
    goldens.check(out, units[f"out_f64/vae_attention_block{suffix}"], f"unit/vae_attention_block{suffix}")


def test_frames_see_only_those_before_them(units, dtype, block):
    x = units["in/vae_attn_x"].to(dtype)
    torch.testing.assert_close(block(x)[:, :, :2], block(x[:, :, :2]), rtol=0, atol=1e-6)


def test_pixels_are_independent_and_may_go_in_parts(units, dtype, block, monkeypatch):
    x = units["in/vae_attn_x"].to(dtype)
    whole = block(x)
    monkeypatch.setattr(attention, "SEQUENCES_AT_ONCE", 4)
    torch.testing.assert_close(block(x), whole, rtol=0, atol=1e-6)
