"""Recomputed parts: the same numbers from less that is kept, and a network that is itself again."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from benchmarks.live_bytes import LiveBytes
from mochi_core.config import DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.errors import MochiError, TrainingError
from mochi_core.memory.blocks import streamed
from mochi_core.memory.copies import SideStream
from mochi_core.training.checkpointing import Checkpoints, checkpointed

CONFIG = DiTConfig(depth=4, heads=3, visual_dim=30, text_dim=14, text_feature_dim=24)
LAYERS = ("attn.qkv_x", "attn.qkv_y", "attn.proj_x", "attn.proj_y", "mlp_x.w2")
ALL = 48

EACH_WAY = pytest.mark.parametrize(
    "checkpoints",
    [
        Checkpoints(),
        Checkpoints(qkv=ALL),
        Checkpoints(feed_forward=ALL),
        Checkpoints(post_attention=ALL),
        Checkpoints(ALL, ALL, ALL),
        Checkpoints(1, 3, 2),
        Checkpoints(blocks=ALL),
        Checkpoints(3, 1, 4, blocks=2),
    ],
    ids=str,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(dit, *counts, size=(3, 6, 4)):
    """A batch of latents, and as many prompts of these lengths."""
    batch, mask = len(counts), torch.arange(9) < torch.tensor(counts)[:, None]
    dtype = dit.pos_frequencies.dtype
    features = random(batch, 9, dit.config.text_feature_dim, seed=1).to(dtype)
    return random(batch, 12, *size).to(dtype), torch.linspace(0.2, 0.8, batch), features, mask


@contextmanager
def low_rank(dit, layers=LAYERS, scale=0.1):
    """A LoRA as simple as can be; gives its factors."""
    factors, handles = [], []
    wide = torch.promote_types(dit.pos_frequencies.dtype, torch.float32)
    for index, block in enumerate(dit.blocks):
        for seed, name in enumerate(layers):
            if index == dit.config.depth - 1 and name == "attn.proj_y":
                continue
            layer = block.get_submodule(name)
            down = random(2, layer.in_features, seed=seed).to(wide).requires_grad_()
            up = random(layer.out_features, 2, seed=seed + 100).to(wide).requires_grad_()

            def add(_, given, out, down=down, up=up):
                return out + scale * (given[0] @ down.to(out).T) @ up.to(out).T

            handles.append(layer.register_forward_hook(add))
            factors += [down, up]
    try:
        yield factors
    finally:
        for handle in handles:
            handle.remove()


def gradients(dit, arguments, learned, run_block):
    for tensor in learned:
        tensor.grad = None
    out = dit(*arguments, run_block=run_block)
    out.square().mean().backward()
    return out.detach(), [tensor.grad for tensor in learned]


def assert_equal(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


@pytest.fixture
def dit(randomised, dtype):
    return randomised(AsymmDiT(CONFIG, dtype=dtype))


@pytest.fixture
def small(randomised):
    return randomised(AsymmDiT(CONFIG))


def state(dit):
    """Each module's own attributes, and its hooks."""
    return [(name, {**vars(module)}, len(module._forward_hooks)) for name, module in dit.named_modules()]


@EACH_WAY
class TestGradients:
    @pytest.mark.parametrize("counts", [(9,), (9, 4)], ids=str)
    def test_of_a_lora(self, dit, checkpoints, counts):
        arguments = inputs(dit, *counts)
        with low_rank(dit) as factors:
            expected = gradients(dit, arguments, factors, lambda index, block, *rest: block(*rest))
            with checkpointed(dit, checkpoints) as run_block:
                out, found = gradients(dit, arguments, factors, run_block)
        assert all(gradient.any() for gradient in found) and torch.equal(out, expected[0])
        assert_equal(found, expected[1])

    def test_of_everything(self, dit, checkpoints):
        arguments = inputs(dit, 9)
        arguments[0].requires_grad_(True)
        learned = [arguments[0], *dit.requires_grad_(True).parameters()]
        expected = gradients(dit, arguments, learned, lambda index, block, *rest: block(*rest))
        with checkpointed(dit, checkpoints) as run_block:
            out, found = gradients(dit, arguments, learned, run_block)
        assert torch.equal(out, expected[0])
        # Gradients that meet in one tensor are added up in another order.
        tolerance = 1e-12 if dit.pos_frequencies.dtype == torch.float64 else 1e-5
        for got, want in zip(found, expected[1]):
            assert (got is None or not got.any()) if want is None else got is not None
            if want is not None:
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())

    def test_the_network_is_itself_again(self, small, checkpoints):
        before = state(small)
        with pytest.raises(KeyError), low_rank(small), checkpointed(small, checkpoints) as run_block:
            small(*inputs(small, 9), run_block=run_block).sum().backward()
            raise KeyError
        assert state(small) == before

    def test_without_gradients(self, small, checkpoints):
        """The same numbers, some tokens at a time too, and no byte more."""
        for tokens in (None, 7):
            small.tokens_at_once = tokens
            peaks, outs = [], []
            with torch.inference_mode():
                for counts in (Checkpoints(), checkpoints):
                    with checkpointed(small, counts) as run_block, LiveBytes() as live:
                        outs.append(small(*inputs(small, 9), run_block=run_block))
                    peaks.append(live.peak)
            assert torch.equal(*outs) and peaks[0] == peaks[1]

    def test_some_tokens_at_a_time(self, small, checkpoints):
        with low_rank(small) as factors:
            expected = gradients(small, inputs(small, 9), factors, lambda index, block, *rest: block(*rest))[1]
            small.tokens_at_once = 7
            with checkpointed(small, checkpoints) as run_block:
                found = gradients(small, inputs(small, 9), factors, run_block)[1]
        for got, want in zip(found, expected):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())

    @pytest.mark.parametrize("resident", (0, 1, 4))
    def test_of_streamed_blocks(self, small, checkpoints, resident):
        arguments = inputs(small, 9)
        with low_rank(small) as factors:
            expected = gradients(small, arguments, factors, lambda index, block, *rest: block(*rest))
            with (
                streamed(small, list(small.blocks), "cpu", resident=resident, copies=SideStream("cpu")) as traffic,
                checkpointed(small, checkpoints, resident=resident) as run_block,
            ):
                for _ in range(2):
                    out, found = gradients(small, arguments, factors, run_block)
                    assert torch.equal(out, expected[0])
                    assert_equal(found, expected[1])
        assert bool(traffic.order) == (resident < 4)


class TestMemory:
    """Bytes that are alive between forward and backward, and at the worst moment of both."""

    @pytest.fixture
    def counted(self, randomised):
        config = DiTConfig(depth=4, heads=6, visual_dim=192, text_dim=96, text_feature_dim=64)
        dit = randomised(AsymmDiT(config))

        def count(checkpoints):
            with LiveBytes() as live, low_rank(dit), checkpointed(dit, checkpoints) as run_block:
                loss = dit(*inputs(dit, 9, size=(2, 16, 16)), run_block=run_block).square().mean()
                kept = live.now
                loss.backward()
            return kept, live.peak

        return count

    def test_each_part_keeps_less(self, counted):
        everything, parts = counted(Checkpoints()), Checkpoints(ALL, ALL, ALL)
        for part in ("qkv", "feed_forward", "post_attention"):
            one = counted(Checkpoints(**{part: ALL}))
            some = counted(Checkpoints(**{part: 2}))
            assert one[0] < some[0] < everything[0] and one[1] < everything[1], part
            assert counted(parts)[0] < one[0]
        whole = counted(Checkpoints(blocks=ALL))
        assert whole[0] < 0.3 * counted(parts)[0] and whole[0] < 0.1 * everything[0]
        assert whole[1] < 0.5 * everything[1]

    def test_whole_blocks_make_the_parts_moot(self, counted):
        assert counted(Checkpoints(blocks=ALL)) == counted(Checkpoints(ALL, ALL, ALL, ALL))


class Watched(nn.Module):
    """Counts how often it runs."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.runs = layer, 0

    def forward(self, x):
        self.runs += 1
        return self.layer(x)


def test_only_what_was_asked_for_runs_twice(small):
    for block in small.blocks:
        block.mlp_x.w1, block.attn.qkv_x = Watched(block.mlp_x.w1), Watched(block.attn.qkv_x)
    with low_rank(small, ("attn.proj_x",)), checkpointed(small, Checkpoints(2, 1, blocks=1)) as run_block:
        small(*inputs(small, 9), run_block=run_block).sum().backward()
    assert [block.mlp_x.w1.runs for block in small.blocks] == [2, 1, 1, 1]
    assert [block.attn.qkv_x.runs for block in small.blocks] == [2, 2, 1, 1]


def test_a_method_that_was_replaced_already_is_put_back(small):
    block = small.blocks[0]
    own = block.feed_forward
    block.feed_forward = own
    with checkpointed(small, Checkpoints(feed_forward=1)):
        assert block.feed_forward is not own
    assert vars(block)["feed_forward"] is own


@pytest.mark.parametrize("checkpoints", [Checkpoints(), Checkpoints(ALL, ALL, ALL), Checkpoints(blocks=2)], ids=str)
def test_streamed_blocks_that_would_not_be_recomputed_whole(small, checkpoints):
    """An error before anything runs."""
    with streamed(small, list(small.blocks), "meta", resident=1, copies=SideStream("cpu")):
        before = state(small)
        with pytest.raises(TrainingError, match="is streamed"), checkpointed(small, checkpoints):
            pass
        assert state(small) == before
        with checkpointed(small, checkpoints, resident=1), checkpointed(small, Checkpoints(blocks=ALL)):
            pass


def test_streamed_blocks_without_any_checkpoint(small):
    """On a CPU, where all lies in one place, streaming itself says it."""
    with (
        low_rank(small, ("attn.qkv_x",)),
        streamed(small, list(small.blocks), "cpu", resident=0, copies=SideStream("cpu")),
        checkpointed(small, Checkpoints()) as run_block,
        pytest.raises(MochiError, match="checkpointed by itself"),
    ):
        small(*inputs(small, 9), run_block=run_block)


@pytest.mark.parametrize("name", ("qkv", "feed_forward", "post_attention", "blocks"))
def test_negative_counts(name):
    with pytest.raises(TrainingError, match=f"{name} = -1") as raised:
        Checkpoints(**{name: -1})
    assert raised.value.value and raised.value.rule and raised.value.remedy


def test_negative_residents(small):
    with pytest.raises(TrainingError, match="less than none"), checkpointed(small, Checkpoints(), resident=-1):
        pass
