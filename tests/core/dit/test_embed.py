import pytest
import torch
from torch import nn

from mochi_core.config import DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.dit.embed import AttentionPool, PatchEmbed, TimestepEmbed, sinusoid

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def units(goldens):
    return goldens.tensors("units")


@pytest.fixture
def pool(units, dtype):
    pool = AttentionPool(32, 20, nn, dtype=dtype)
    prefix = "w/attention_pool/"
    pool.load_state_dict({k.removeprefix(prefix): v for k, v in units.items() if k.startswith(prefix)})
    return pool


def test_sinusoid(goldens, units, dtype):
    out = sinusoid(units["in/t"].to(dtype) * 1000)
    goldens.check(out, units["out_f64/timestep_embedding_of_1000t"], "unit/timestep_embedding_of_1000t")


def test_noise_levels_count_backwards_in_float32_whatever_the_weights(units):
    """The network was trained on 1000 * (1 - sigma); bfloat16 could not tell 998 from 1000."""
    embed, inputs = TimestepEmbed(8, 1000.0, nn, dtype=torch.bfloat16), []
    embed.mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    sigma = torch.tensor([0.0, 0.001, 1.0])
    assert embed(sigma, torch.bfloat16).shape == (3, 8)
    assert torch.equal(inputs[0], sinusoid(1000 * (1 - sigma)).bfloat16())


def test_attention_pool(goldens, units, dtype, pool):
    """Rows of the case: a prefix, two scattered tokens, all tokens, none."""
    out = pool(units["in/pool_x"].to(dtype), units["in/pool_mask"])
    goldens.check(out, units["out_f64/attention_pool"], "unit/attention_pool")


def test_attention_pool_ignores_masked_tokens(units, dtype, pool):
    features, mask = units["in/pool_x"].to(dtype), units["in/pool_mask"]
    changed = torch.where(mask[:, :, None], features, 1e3)
    torch.testing.assert_close(pool(changed, mask), pool(features, mask), rtol=0, atol=1e-6)


def test_attention_pool_of_one_token_is_its_value(units, dtype, pool):
    """The mean of one token is that token, and attending to it twice is attending to it."""
    token = units["in/pool_x"][:1, :1].to(dtype)
    _, value = pool.to_kv(token[:, 0]).chunk(2, dim=-1)
    out = pool(token, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(out, pool.to_out(value), rtol=0, atol=1e-6)


def test_attention_pool_of_no_tokens_is_that_of_an_empty_mask(units, dtype, pool):
    features, mask = units["in/pool_x"].to(dtype), units["in/pool_mask"]
    torch.testing.assert_close(pool(features[3:, :0], mask[3:, :0]), pool(features, mask)[3:], rtol=0, atol=1e-6)


def test_patches_run_through_columns_then_rows_then_frames():
    embed = PatchEmbed(2, 1, 1, nn)
    embed.proj.weight.fill_(0.25)
    embed.proj.bias.zero_()
    patches = torch.arange(2 * 3 * 4.0).view(1, 1, 2, 3, 4)
    latents = patches.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.equal(embed(latents).flatten(), torch.arange(24.0))


def test_unpatchify_puts_patches_where_they_came_from():
    dit = AsymmDiT(DiTConfig(depth=1, heads=1, visual_dim=4, text_dim=4, text_feature_dim=8), device="meta")
    latents = torch.randn(2, 12, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    patches = latents.unfold(3, 2, 2).unfold(4, 2, 2)  # B C T rows columns p q
    tokens = patches.permute(0, 2, 3, 4, 5, 6, 1).reshape(2, 3 * 2 * 3, 48)
    assert torch.equal(dit.unpatchify(tokens, 3, 2, 3), latents)
