"""What a budget allows a training, and that what is planned fits."""

import pytest
import torch

from benchmarks.streaming_plan import Case
from benchmarks.training_memory import Training, counted
from mochi_core.config import TINY
from mochi_core.dit import AsymmDiT
from mochi_core.errors import MemoryBudgetError
from mochi_core.memory.blocks import block_bytes
from mochi_core.memory.plan import KEPT_BACK
from mochi_core.memory.training_need import Checkpoints
from mochi_core.memory.training_plan import plan_training
from mochi_core.shapes import VideoSize
from mochi_core.weights import build
from mochi_core.weights.convert import convert

PLENTY = 10**12


def clip(frames):
    return VideoSize(848, 480, frames)


@pytest.fixture(scope="module")
def released():
    return AsymmDiT(dtype=torch.bfloat16, device="meta").requires_grad_(False)


def planned(network, gigabytes, frames=37, device="cuda", host_bytes=PLENTY, **more):
    return plan_training(gigabytes * 1e9, clip(frames), network, device, host_bytes=host_bytes, **more)


class TestReleased:
    @pytest.mark.parametrize("frames", (37, 61, 85))
    @pytest.mark.parametrize("gigabytes", (12, 16, 24, 32, 48, 80, 141))
    def test_no_plan_exceeds_its_budget(self, released, gigabytes, frames):
        try:
            made = planned(released, gigabytes, frames)
        except MemoryBudgetError as error:
            assert gigabytes == 12 and frames > 37 and error.least > 12e9
            return
        assert made.peak == made.weights + made.activations + made.lora <= gigabytes * 1e9 * (1 - KEPT_BACK)

    @pytest.mark.parametrize("frames", (37, 61, 79, 85))
    def test_the_claim(self, released, frames):
        """A LoRA of rank 16 in 24 GB, at 848 x 480, of weights in bfloat16."""
        assert planned(released, 24, frames).peak < 22.5e9

    def test_what_is_given_first(self, released):
        plenty, large, middle, small = (planned(released, gigabytes) for gigabytes in (141, 80, 58, 34))
        assert plenty.checkpoints == Checkpoints() and plenty.resident == 48
        assert 0 < large.checkpoints.feed_forward < 48 and large.checkpoints.qkv == large.checkpoints.blocks == 0
        assert middle.checkpoints.feed_forward == 48 and 0 < middle.checkpoints.qkv < 48
        assert middle.checkpoints.qkv == middle.checkpoints.post_attention and not middle.checkpoints.blocks
        assert 0 < small.checkpoints.blocks < 48 == small.checkpoints.qkv and small.resident == 48
        streamed = planned(released, 24)
        assert streamed.checkpoints == Checkpoints(blocks=48) and 0 < streamed.resident < 48

    def test_more_memory_is_never_worse(self, released):
        plans = [planned(released, gigabytes) for gigabytes in (10, 16, 24, 28, 32, 40, 48, 64, 80, 100)]
        for names in (("blocks",), ("qkv", "blocks"), ("feed_forward", "blocks")):
            counts = [max(getattr(made.checkpoints, name) for name in names) for made in plans]
            assert counts == sorted(counts, reverse=True)
        residents = [made.resident for made in plans]
        assert residents == sorted(residents) and residents[0] < residents[-1] == 48

    def test_too_little_says_the_least_that_will_do(self, released):
        with pytest.raises(MemoryBudgetError, match="the training needs at least") as raised:
            planned(released, 3)
        least = raised.value.least
        made = planned(released, least / 1e9 + 1e-6)
        assert made.resident <= 1 and made.peak <= least
        with pytest.raises(MemoryBudgetError):
            planned(released, least / 1e9 - 1e-3)

    def test_where_streamed_weights_wait(self, released):
        made = planned(released, 24)
        assert made.source == "pinned" and made.streamed_bytes == (48 - made.resident) * block_bytes(released.blocks)[0]
        assert planned(released, 24, host_bytes=10**9).source == "file"

    def test_more_to_learn_leaves_less(self, released):
        plain = planned(released, 24)
        assert planned(released, 24, averaged=True).lora == plain.lora * 5 // 4
        everywhere = planned(released, 24, ranks=dict(qkv=128, out=128, feed_forward=128))
        assert everywhere.lora > plain.lora and everywhere.resident < plain.resident
        assert planned(released, 32, batch=2).resident < planned(released, 32).resident

    def test_in_words(self, released):
        words = str(planned(released, 24))
        assert "848 x 480, 37 frames, 24.0 GB on cuda" in words and "streamed from host memory" in words
        assert "recomputed of blocks: 48 whole" in words
        assert "nothing recomputed" in str(planned(released, 141)) and "48 of 48" in str(planned(released, 141))
        assert "from the file" in str(planned(released, 24, host_bytes=0))


def test_on_a_cpu_weights_lie_where_they_were_loaded():
    network = AsymmDiT(TINY.dit)
    size = VideoSize(64, 64, 7)
    made = plan_training(1e9, size, network, "cpu")
    assert made.weights == made.streamed_bytes == 0 and "where they were loaded" in str(made)
    with pytest.raises(MemoryBudgetError) as raised:
        plan_training(1e6, size, network, "cpu")
    assert plan_training(raised.value.least + 1, size, network, "cpu").checkpoints.blocks > 0


def test_quantised_weights_leave_more_room(tmp_path):
    path = tmp_path / "dit.safetensors"
    convert(build.TINY_DIT, path, format="q8_0")
    packed = build.load_dit(path, dtype=torch.float32)[0]
    plain = build.load_dit(build.TINY_DIT, dtype=torch.float32)[0]
    made = [plan_training(1e9, VideoSize(64, 64, 7), network.requires_grad_(False)) for network in (plain, packed)]
    assert made[1].weights < 0.5 * made[0].weights
    # What a weight is unpacked to comes on top of the work.
    assert made[1].activations > made[0].activations


@pytest.mark.parametrize("megabytes", (16, 18, 22, 30, 60))
def test_what_is_planned_is_what_is_counted(megabytes):
    size = VideoSize(256, 256, 7)
    network = AsymmDiT(TINY.dit, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    made = plan_training(megabytes * 1e6, size, network, text_tokens=16, host_bytes=0)
    case = Case(TINY.dit, size.latent, torch.bfloat16, text_tokens=16)
    training = Training(case, made.checkpoints, made.resident)
    true = counted(training) + training.optimizer_bytes(of=12)
    assert true <= made.peak <= 1.13 * true
