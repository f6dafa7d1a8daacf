"""Some tokens at a time give what all at once give, in less memory."""

from dataclasses import replace

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from mochi_core.attention.joint import QKV, PlainJointAttention, side_by_side
from mochi_core.config import TINY, DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.dit.layers import in_chunks
from mochi_core.dit.rope import rotations
from mochi_core.weights.lora import attached, branches
from mochi_core.weights.lora_file import Lora, LowRank

SMALL = DiTConfig(depth=2, heads=3, visual_dim=30, text_dim=14, text_feature_dim=24)
CHUNKS = (1, 7, 64, 1000)
TOKENS = 3 * 6 * 4


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def dit(randomised):
    return randomised(AsymmDiT(SMALL))


def inputs(*counts):
    """A batch of latents of 72 tokens each, and as many prompts of these lengths."""
    batch, mask = len(counts), torch.arange(9) < torch.tensor(counts)[:, None]
    features = random(batch, 9, SMALL.text_feature_dim, seed=1)
    return random(batch, 12, 3, 12, 8), torch.linspace(0.2, 0.8, batch), features, mask


def in_parts(dit, tokens_at_once, *arguments, **options):
    dit.tokens_at_once = tokens_at_once
    try:
        return dit(*arguments, **options)
    finally:
        dit.tokens_at_once = None


def assert_same(actual, expected):
    """Up to what matrix products of another size round differently."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.usefixtures("no_gradients")
class TestWithoutGradients:
    @pytest.mark.parametrize("tokens_at_once", CHUNKS)
    @pytest.mark.parametrize("counts", [(9,), (5,), (0,), (9, 4), (0, 3)], ids=str)
    def test_chunks_are_the_whole(self, dit, counts, tokens_at_once):
        assert_same(in_parts(dit, tokens_at_once, *inputs(*counts)), dit(*inputs(*counts)))

    @pytest.mark.parametrize("tokens_at_once", CHUNKS)
    def test_in_double_precision_to_the_last_digits(self, dit, tokens_at_once):
        dit, (latents, *rest) = dit.double(), inputs(9, 4)
        expected = dit(latents.double(), *rest)
        actual = in_parts(dit, tokens_at_once, latents.double(), *rest)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13 * expected.abs().max().item())

    @pytest.mark.parametrize("kernel", ("reference", "sdpa"))
    def test_with_each_kernel(self, dit, kernel):
        for block in dit.blocks:
            block.attn.joint = PlainJointAttention(kernel)
        assert_same(in_parts(dit, 7, *inputs(9, 4)), dit(*inputs(9, 4)))

    @pytest.mark.parametrize("tokens_at_once", CHUNKS)
    def test_with_lora_beside_the_layers(self, dit, tokens_at_once):
        names = ("attn.qkv_x", "attn.qkv_y", "attn.proj_x", "mlp_x.w1", "mlp_x.w2", "mod_x")
        shapes = {
            f"blocks.{i}.{name}": dit.blocks[i].get_submodule(name).weight.shape for i in (0, 1) for name in names
        }
        changes = {
            name: LowRank(random(4, width_in, seed=2), random(width_out, 4, seed=3), 0.1)
            for name, (width_out, width_in) in shapes.items()
        }
        without = dit(*inputs(9))
        with attached(dit, branches([(Lora("", changes, ()), 1.0)])):
            expected = dit(*inputs(9))
            assert_same(in_parts(dit, tokens_at_once, *inputs(9)), expected)
        assert not torch.allclose(expected, without, atol=1e-3)

    @pytest.mark.parametrize("tokens_at_once", (None, 7))
    def test_what_went_into_a_block_stays_as_it_was(self, dit, tokens_at_once):
        """Whoever is around a block may keep it: to compare, or to run the block again."""

        def run_block(index, block, visual, text, *rest):
            before = visual.clone(), text.clone()
            out = block(visual, text, *rest)
            assert torch.equal(visual, before[0]) and torch.equal(text, before[1])
            return out

        in_parts(dit, tokens_at_once, *inputs(9), run_block=run_block)

    def test_another_joint_attention_gets_the_streams_as_ever(self, dit):
        expected, shapes = dit(*inputs(9, 4)), []

        def joint(visual, text, text_mask):
            shapes.append([*(x.shape for x in visual), *(x.shape for x in text)])
            copies = QKV(*(x.clone() for x in visual)), QKV(*(x.clone() for x in text))
            return PlainJointAttention()(*copies, text_mask)

        for block in dit.blocks:
            block.attn.joint = joint
        assert_same(in_parts(dit, 7, *inputs(9, 4)), expected)
        assert shapes == [[(2, TOKENS, 3, 10)] * 3 + [(2, 9, 3, 10)] * 3] * SMALL.depth

    def test_one_block_may_be_cut_alone(self, dit):
        expected = dit(*inputs(9))
        dit.blocks[1].tokens_at_once = 7
        assert_same(dit(*inputs(9)), expected)

    def test_less_is_alive(self, randomised):
        """Of the released proportions; only the attention still holds all tokens, five times."""
        tokens, config = 32 * 32, replace(TINY.dit, depth=2)
        dit, peaks = randomised(AsymmDiT(config)), []
        arguments = random(1, 12, 1, 64, 64), torch.ones(1), random(1, 3, 64), torch.ones(1, 3)
        for tokens_at_once in (None, 64):
            with LiveBytes() as live:
                in_parts(dit, tokens_at_once, *arguments)
            peaks.append(live.peak / (tokens * config.visual_dim * 4))
        assert peaks[0] > 12 and 5 < peaks[1] < 6.5


def test_gradients_are_the_whole_s(randomised):
    found = {}
    for tokens_at_once in (None, 1, 7, 1000):
        dit = randomised(AsymmDiT(SMALL)).requires_grad_(True)
        latents, *rest = inputs(9, 4)
        latents.requires_grad_(True)
        in_parts(dit, tokens_at_once, latents, *rest).square().mean().backward()
        found[tokens_at_once] = {name: p.grad for name, p in dit.named_parameters()} | {"latents": latents.grad}
    for gradients in (found[1], found[7], found[1000]):
        for name, expected in found[None].items():
            if expected is None:
                assert gradients[name] is None or not gradients[name].any()
            else:
                torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)
    assert found[7]["pos_frequencies"].any() and found[7]["blocks.0.attn.qkv_y.weight"].any()


def test_frozen_weights_under_gradients_that_reach_the_inputs(dit):
    """As when a LoRA trains: autograd is on, and some tensors ask for no gradient."""
    (latents, *rest), gradients = inputs(9), []
    for tokens_at_once in (None, 7):
        given = latents.clone().requires_grad_(True)
        in_parts(dit, tokens_at_once, given, *rest).square().mean().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


class TestSideBySide:
    def joined(self):
        return random(2, 9, 3, 4)

    def test_what_lies_together_is_not_copied(self):
        joined = self.joined()
        out = side_by_side(joined[:, :7], joined[:, 7:])
        assert torch.equal(out, joined.transpose(1, 2)) and out.data_ptr() == joined.data_ptr()

    @pytest.mark.parametrize("visual, text", [(slice(0, 5), slice(6, 9)), (slice(2, 9), slice(0, 2))])
    def test_what_does_not_is(self, visual, text):
        joined = self.joined()
        parts = joined[:, visual], joined[:, text]
        out = side_by_side(*parts)
        assert torch.equal(out, torch.cat(parts, dim=1).transpose(1, 2)) and out.data_ptr() != joined.data_ptr()

    def test_equal_layouts_in_two_memories_are_not_together(self):
        visual, text = random(1, 4, 3, 2), random(2, 4, 3, 2, seed=1)[1:]
        assert torch.equal(side_by_side(visual, text), torch.cat([visual, text], dim=1).transpose(1, 2))

    def test_no_text(self):
        joined = self.joined()
        assert torch.equal(side_by_side(joined, joined[:, 9:]), joined.transpose(1, 2))

    def test_gradients_reach_both(self):
        joined = self.joined().requires_grad_(True)
        side_by_side(joined[:, :7], joined[:, 7:]).sum().backward()
        assert torch.equal(joined.grad, torch.ones_like(joined))


@pytest.mark.parametrize("part", [slice(None), slice(0, 1), slice(5, 31), slice(59, 60), slice(50, 99)], ids=str)
def test_factors_of_rotations_give_any_part_of_the_table(part):
    grid = random(3, 2, 4), 3, 4, 5, torch.device("cpu")
    assert torch.equal(rotations(*grid)[part], rotations(*grid).table()[part])


def test_in_chunks_cuts_all_streams_alike():
    lengths, a, b = [], random(2, 10, 3), random(2, 10, 5, seed=1)

    def work(x, y):
        lengths.append(x.shape[1])
        return x.sum(-1, keepdim=True) * y

    assert torch.equal(in_chunks(work, 4, a, b), a.sum(-1, keepdim=True) * b)
    assert lengths == [4, 4, 2]
