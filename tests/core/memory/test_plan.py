"""What a budget allows, and that what is done is what was planned."""

import dataclasses
import functools

import pytest
import torch

from mochi_core.config import MOCHI_1, TINY
from mochi_core.errors import MemoryBudgetError
from mochi_core.memory import plan as module
from mochi_core.memory.blocks import spread
from mochi_core.memory.copies import SideStream
from mochi_core.memory.need import dit_activations
from mochi_core.memory.plan import (
    BUSY_TOKENS,
    KEPT_BACK,
    MemoryPolicy,
    Networks,
    decode_context,
    decode_plan,
    free_bytes,
    placed,
    plan,
)
from mochi_core.shapes import VideoSize
from mochi_core.weights import build
from mochi_core.weights.convert import convert
from mochi_core.weights.quantized import QuantizedLinear

FULL = VideoSize(848, 480, 163)
PLENTY = 10**12


@pytest.fixture(scope="module")
def released():
    return Networks.released()


def planned(networks, budget, size=FULL, device="cuda", host_bytes=PLENTY, **more):
    return plan(budget, size, networks, device, host_bytes=host_bytes, **more)


class TestPlans:
    @pytest.mark.parametrize("gigabytes", (3, 4, 6, 8, 12, 16, 24, 32, 80))
    def test_no_plan_exceeds_its_budget(self, released, gigabytes):
        made = planned(released, gigabytes * 1e9)
        assert made.peak <= gigabytes * 1e9 * (1 - KEPT_BACK)

    def test_more_memory_is_never_worse(self, released):
        plans = [planned(released, gigabytes * 1e9) for gigabytes in (3, 5, 8, 12, 18, 24, 48)]
        for part in ("text", "dit"):
            residents = [getattr(made, part).resident for made in plans]
            assert residents == sorted(residents)
        assert [made.decode.frames_on_host for made in plans] == sorted(
            (made.decode.frames_on_host for made in plans), reverse=True
        )

    def test_with_plenty_all_is_resident_and_whole(self, released):
        made = planned(released, 80e9)
        assert made.dit.resident == made.dit.blocks == 48 and made.text.resident == 24
        assert made.dit.tokens_at_once is None and made.dit.streamed_bytes == 0
        assert made.decode.frames_on_host == 0

    def test_chunks_come_before_streaming(self, released):
        made = planned(released, 24e9)
        assert made.dit.resident == 48 and made.dit.tokens_at_once == BUSY_TOKENS

    def test_smaller_chunks_when_nothing_else_helps(self, released):
        tight = planned(released, 2.62e9)
        assert tight.dit.resident == 0 and tight.dit.tokens_at_once < BUSY_TOKENS

    def test_the_claims(self, released):
        """Sampling in 6 GB and an exact decode in 3 GB of 848 x 480, 163 frames."""
        assert planned(released, 6e9).dit.peak < 6e9
        assert planned(released, 3e9).decode.peak < 3e9

    def test_weights_wait_in_the_file_when_the_host_is_small(self, released):
        assert planned(released, 8e9).dit.source == "pinned"
        assert planned(released, 8e9, host_bytes=10**9).dit.source == "file"

    @pytest.mark.parametrize("gigabytes", (3, 8, 12, 21))
    def test_what_waits_is_what_is_packed(self, released, gigabytes):
        made, blocks = planned(released, gigabytes * 1e9).dit, released.dit.blocks
        streamed_blocks = [blocks[index] for index in spread(48, made.resident)]
        held = sum(parameter.nbytes for block in streamed_blocks for parameter in block.parameters())
        assert held <= made.streamed_bytes < 1.001 * held
        assert planned(released, gigabytes * 1e9, host_bytes=made.streamed_bytes).dit.source == "pinned"
        assert planned(released, gigabytes * 1e9, host_bytes=made.streamed_bytes - 1).dit.source == "file"

    def test_two_blocks_of_unlike_size_need_no_slots(self):
        """Two slots as large as the larger would be more than all."""
        config = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, depth=2))
        networks = Networks.released(config)
        ample = planned(networks, PLENTY, VideoSize(64, 64, 7)).dit
        assert planned(networks, ample.peak / (1 - KEPT_BACK) + 10**8, VideoSize(64, 64, 7)).dit.resident == 2

    def test_floats_of_quantised_weights_count(self, tmp_path):
        convert(build.TINY_DIT, tmp_path / "dit.safetensors", format="q8_0")
        packed, plain = (build.load_dit(path)[0] for path in (tmp_path / "dit.safetensors", build.TINY_DIT))
        others = Networks.released(TINY)
        made = [planned(dataclasses.replace(others, dit=dit), PLENTY).dit for dit in (packed, plain)]
        layers = [layer for layer in packed.modules() if isinstance(layer, QuantizedLinear)]
        largest = max(layer.in_features * layer.out_features for layer in layers)
        beside = dit_activations(TINY.dit, FULL.latent, dtype=next(packed.parameters()).dtype)
        assert made[0].activations - beside >= 2 * largest
        assert made[0].weights < made[1].weights

    def test_small_videos_need_less(self, released):
        small = planned(released, 8e9, VideoSize(432, 240, 25))
        assert small.dit.activations < planned(released, 8e9).dit.activations
        assert small.dit.resident > planned(released, 8e9).dit.resident

    def test_both_halves_of_guidance_at_once(self, released):
        assert planned(released, 24e9, batch=2).dit.activations > planned(released, 24e9).dit.activations

    def test_on_a_cpu_weights_stay_where_they_are(self, released):
        made = planned(released, 4e9, device="cpu")
        assert made.dit.weights == made.text.weights == made.decode.weights == 0
        assert made.dit.resident == 48 and made.dit.tokens_at_once == BUSY_TOKENS
        assert "weights where they were loaded" in str(made)

    def test_it_is_printable(self, released):
        text = str(planned(released, 4e9, host_bytes=2 * 10**9))
        assert text.startswith("848 x 480, 163 frames, 4.0 GB on cuda\n")
        assert "GB streamed from the file, 4096 tokens at once" in text
        assert "kept frames on the host" in text
        assert len(text.splitlines()) == 4


class TestTooLittle:
    @pytest.mark.parametrize("budget", (0, 0.1e9, 1.5e9))
    def test_the_least_is_named_and_is_enough(self, released, budget):
        with pytest.raises(MemoryBudgetError, match=r"^The budget is .* GB: .* needs at least [\d.]+ GB") as caught:
            planned(released, budget)
        least = float(str(caught.value).split("at least ")[1].split(" GB")[0]) * 1e9
        assert caught.value.least <= least
        assert planned(released, least).peak <= least
        with pytest.raises(MemoryBudgetError):
            planned(released, least * 0.99)

    def test_the_decoder(self, released):
        with pytest.raises(MemoryBudgetError, match=r"^The budget is 0\.500 GB: the decoder needs at least"):
            decode_plan(released.decoder, FULL.latent, 0.5e9, "cuda")

    def test_on_a_cpu(self, released):
        with pytest.raises(MemoryBudgetError, match="the decoder needs at least"):
            planned(released, 0.5e9, device="cpu")


@pytest.fixture
def tiny_networks(tiny):
    return Networks(tiny.text_encoder.model, tiny.dit, tiny.decoder)


@pytest.fixture
def forced(monkeypatch):
    """Streams even where everything lies on the device already."""
    monkeypatch.setattr(module, "streamed", functools.partial(module.streamed, copies=SideStream("cpu")))


@pytest.mark.usefixtures("no_gradients", "forced")
class TestDone:
    @pytest.mark.parametrize("resident", (0, 1, 3, 4))
    def test_no_more_blocks_are_there_than_planned(self, tiny, resident):
        how = dataclasses.replace(self.plan_of(tiny), resident=resident, tokens_at_once=7)
        x = torch.randn(1, 12, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        text = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
        inputs = x, torch.tensor([0.5]), text, torch.ones(1, 3)
        expected = tiny.dit(*inputs)
        with placed(tiny.dit, tiny.dit.blocks, how, "cpu") as traffic:
            assert tiny.dit.tokens_at_once == 7
            for _ in range(2):
                torch.testing.assert_close(tiny.dit(*inputs), expected, rtol=0, atol=1e-5)
                assert traffic.on_device <= min(4, resident + 2)
        assert traffic.most <= min(4, resident + 2)
        assert tiny.dit.tokens_at_once is None

    def test_an_error_leaves_no_trace(self, tiny):
        how = dataclasses.replace(self.plan_of(tiny), resident=0, tokens_at_once=7)
        with pytest.raises(KeyError), placed(tiny.dit, tiny.dit.blocks, how, "cpu"):
            raise KeyError
        assert tiny.dit.tokens_at_once is None
        assert not any(block._forward_pre_hooks for block in tiny.dit.blocks)

    def plan_of(self, tiny):
        networks = Networks(tiny.text_encoder.model, tiny.dit, tiny.decoder)
        return planned(networks, PLENTY, VideoSize(64, 64, 7)).dit


def test_a_decode_context_is_as_planned(tiny):
    roomy = decode_plan(tiny.decoder, VideoSize(64, 64, 19).latent, PLENTY, "cuda")
    tight = decode_plan(tiny.decoder, VideoSize(64, 64, 19).latent, roomy.peak * 1.05, "cuda")
    assert roomy.frames_on_host == 0 < tight.frames_on_host
    with decode_context(roomy, "cpu") as context:
        assert context._values_at_once == roomy.values_at_once
    with decode_context(tight, "cpu") as context:
        assert context._store._keep_bytes == tight.frames_on_device


def test_the_released_networks_have_the_released_sizes(released):
    assert sum(p.numel() for p in released.dit.parameters()) == 10_027_677_744
    assert released.dit.config == MOCHI_1.dit
    assert Networks.released(TINY).dit.config == TINY.dit


def test_a_policy_without_a_budget_takes_what_is_free(tiny_networks):
    made = MemoryPolicy("cpu").plan(VideoSize(64, 64, 7), tiny_networks)
    assert made.budget == pytest.approx(free_bytes("cpu"), rel=0.2)


def test_by_default_it_is_the_released_model(released):
    assert plan(8e9, FULL, host_bytes=PLENTY) == planned(released, 8e9)
