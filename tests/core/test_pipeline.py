import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from mochi_core.config import DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.errors import (
    ConditioningError,
    LatentsError,
    MemoryBudgetError,
    ScheduleError,
    ShapeError,
    WeightsError,
)
from mochi_core.latents import LatentStatistics
from mochi_core.memory import plan as plan_module
from mochi_core.memory.copies import SideStream
from mochi_core.memory.plan import MemoryPolicy, plan
from mochi_core.pipeline import MochiPipeline, TextToVideo
from mochi_core.sampling.schedule import linear_quadratic
from mochi_core.shapes import VideoSize
from mochi_core.weights import build

REQUEST = TextToVideo(
    "a red circle moving right on a black background",
    size=VideoSize(64, 64, 7),
    schedule=linear_quadratic(4),
    cfg=4.0,
)


class Cancelled(Exception):
    pass


class TestVideo:
    @pytest.mark.parametrize("width, height, frames", [(64, 64, 13), (32, 48, 1), (16, 16, 7)])
    def test_shape_and_range(self, tiny, width, height, frames):
        video = tiny(replace(REQUEST, size=VideoSize(width, height, frames)))
        assert video.shape == (frames, height, width, 3)
        assert video.dtype == torch.float32 and video.device.type == "cpu"
        assert video.min() >= 0 and video.max() <= 1 and video.std() > 0.01

    def test_it_shows_what_was_asked_for(self, tiny):
        """The embedded checkpoint is real: red on black, brighter in the middle than at the edge."""
        request = replace(
            REQUEST, prompt="a red circle standing still on a black background", schedule=linear_quadratic(20)
        )
        red, green, blue = tiny(request).mean(0).unbind(-1)
        assert red.max() > 0.6 and green.max() < 0.4 and blue.max() < 0.4
        assert red[:4].mean() < 0.2

    def test_the_seed_decides_and_nothing_else_does(self, tiny):
        state = torch.random.get_rng_state()
        video = tiny(REQUEST)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(99)
        assert torch.equal(tiny(REQUEST), video)
        assert not torch.allclose(tiny(replace(REQUEST, seed=1)), video, atol=0.05)

    def test_batched_guidance_gives_the_same(self, tiny):
        torch.testing.assert_close(tiny(replace(REQUEST, batched_cfg=True)), tiny(REQUEST), rtol=0, atol=1e-4)

    def test_scales_of_each_step(self, tiny):
        assert torch.equal(tiny(replace(REQUEST, cfg=(4.0,) * 4)), tiny(REQUEST))
        assert not torch.allclose(tiny(replace(REQUEST, cfg=(4.0, 4.0, 1.0, 1.0))), tiny(REQUEST), atol=1e-3)

    def test_a_negative_prompt_matters(self, tiny):
        assert not torch.allclose(tiny(replace(REQUEST, negative="a blue box")), tiny(REQUEST), atol=1e-3)

    @pytest.mark.parametrize("prompt", ("", " ", "red " * 5000, "zebra 红色 🔴"))
    def test_any_prompt(self, tiny, prompt):
        video = tiny(replace(REQUEST, prompt=prompt, size=VideoSize(16, 16, 1), schedule=linear_quadratic(2)))
        assert video.isfinite().all()

    @pytest.mark.parametrize("precision", (torch.bfloat16, torch.float16))
    def test_in_half_precision(self, tiny, precision):
        request = replace(REQUEST, size=VideoSize(32, 32, 7))
        video = MochiPipeline.tiny(precision)(request)
        assert video.dtype == torch.float32
        assert (video - tiny(request)).abs().mean() < 0.05


class TestParts:
    def test_sampled_latents_are_in_vae_space(self, tiny):
        in_model_space = replace(tiny, statistics=LatentStatistics((0.0,) * 12, (1.0,) * 12)).sample(REQUEST)
        torch.testing.assert_close(tiny.sample(REQUEST), tiny.statistics.to_vae_space(in_model_space))

    def test_decoding_piece_by_piece_is_the_video(self, tiny):
        latents = tiny.sample(REQUEST)
        pieces = list(tiny.decode(latents))
        assert [piece.shape for piece in pieces] == [(1, 1, 64, 64, 3), (1, 6, 64, 64, 3)]
        assert torch.equal(torch.cat(pieces, dim=1)[0], tiny(REQUEST))

    def test_progress_counts_the_steps(self, tiny):
        reports = []
        tiny(REQUEST, lambda *report: reports.append(report))
        assert [(step, total) for step, total, _ in reports] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert all(preview.shape == (1, 12, 2, 8, 8) for *_, preview in reports)

    def test_progress_cancels(self, tiny, layer_runs):
        def cancel(step, total, preview):
            raise Cancelled

        runs = layer_runs(tiny.decoder)
        with pytest.raises(Cancelled):
            tiny(REQUEST, cancel)
        assert not runs


class TestRequestsThatCannotBe:
    @pytest.fixture
    def runs(self, tiny, layer_runs):
        """What any network ran."""
        counts = [layer_runs(network) for network in (tiny.text_encoder.model, tiny.dit, tiny.decoder)]
        return lambda: sum(count.total() for count in counts)

    @pytest.mark.parametrize(
        "cfg, message",
        [
            ((4.0,) * 3, "The CFG schedule covers 3 steps: the noise schedule has 4"),
            ((), "The CFG schedule covers 0 steps"),
            (math.nan, "The CFG scale of step 0 is nan"),
            ((4.0, 4.0, math.inf, 4.0), "The CFG scale of step 2 is inf"),
        ],
    )
    def test_cfg(self, tiny, runs, cfg, message):
        with pytest.raises(ScheduleError, match=message):
            tiny(replace(REQUEST, cfg=cfg))
        assert runs() == 0

    def test_size_and_schedule_are_refused_where_they_are_made(self):
        with pytest.raises(ShapeError):
            replace(REQUEST, size=VideoSize(64, 64, 26))
        with pytest.raises(ScheduleError):
            replace(REQUEST, schedule=linear_quadratic(1))

    @pytest.mark.parametrize("bad", (math.nan, math.inf))
    def test_latents_to_decode(self, tiny, runs, bad):
        latents = torch.zeros(1, 12, 2, 4, 4)
        latents[0, 0, 1, 0, 0] = bad
        with pytest.raises(LatentsError, match=r"^The latents to decode: 1 of 384 values are NaN or infinite: "):
            list(tiny.decode(latents))
        assert runs() == 0

    def test_latents_of_another_model(self, tiny, runs):
        with pytest.raises(LatentsError, match="they must be B x 12 x T x H x W"):
            list(tiny.decode(torch.zeros(1, 16, 1, 4, 4)))
        assert runs() == 0

    def test_a_text_encoder_that_does_not_belong_to_the_dit(self, tiny, layer_runs):
        dit = AsymmDiT(DiTConfig(depth=1, heads=1, visual_dim=8, text_dim=8, text_feature_dim=128))
        runs = layer_runs(dit)
        with pytest.raises(
            ConditioningError,
            match=r"T5 gives features of width 64: this DiT reads features of width 128\. Load the T5",
        ):
            replace(tiny, dit=dit)
        assert not runs

    def test_statistics_of_another_model(self, tiny, runs):
        with pytest.raises(LatentsError, match=r"statistics have 1 channels: this DiT makes latents of 12\."):
            replace(tiny, statistics=LatentStatistics((0.0,), (1.0,)))
        assert runs() == 0


class Elsewhere(MemoryPolicy):
    """A policy for a device that is not here: all is streamed, in chunks, though there is room."""

    def plan(self, size, networks, *, batch=1):
        made = plan(10**12, size, networks, "cuda", batch=batch, host_bytes=0)
        text, dit = (replace(part, resident=1) for part in (made.text, made.dit))
        return replace(made, text=text, dit=replace(dit, tokens_at_once=5))


class TestMemory:
    def test_as_much_as_is_free(self, tiny):
        ours = replace(tiny, memory=MemoryPolicy("cpu"))
        assert torch.equal(ours(REQUEST), tiny(REQUEST))
        assert "weights where they were loaded" in str(ours.plan(REQUEST))
        assert tiny.plan(REQUEST) is None

    def test_streamed_in_chunks_it_is_the_same_video(self, tiny, monkeypatch):
        monkeypatch.setattr(plan_module, "streamed", partial(plan_module.streamed, copies=SideStream("cpu")))
        ours = replace(tiny, memory=Elsewhere("cpu"))
        torch.testing.assert_close(ours(REQUEST), tiny(REQUEST), rtol=0, atol=1e-4)

    def test_too_little_is_said_before_anything_runs(self, tiny, layer_runs):
        ours = replace(tiny, memory=MemoryPolicy("cpu", budget=1000))
        runs = layer_runs(ours.text_encoder.model)
        with pytest.raises(MemoryBudgetError, match="needs at least"):
            ours(REQUEST)
        assert not runs

    def test_a_cancelled_step_leaves_no_trace(self, tiny, monkeypatch):
        monkeypatch.setattr(plan_module, "streamed", partial(plan_module.streamed, copies=SideStream("cpu")))
        ours = replace(tiny, memory=Elsewhere("cpu"))
        before = [id(parameter) for parameter in ours.dit.parameters()]

        def cancel(step, total, preview=None):
            raise Cancelled

        with pytest.raises(Cancelled):
            ours.sample(REQUEST, cancel)
        assert [id(parameter) for parameter in ours.dit.parameters()] == before
        assert ours.dit.tokens_at_once is None
        torch.testing.assert_close(ours(REQUEST), tiny(REQUEST), rtol=0, atol=1e-4)

    def test_a_file_that_changed_is_noticed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan_module, "streamed", partial(plan_module.streamed, copies=SideStream("cpu")))
        dit = tmp_path / "dit.safetensors"
        shutil.copy(build.TINY_DIT, dit)
        ours = MochiPipeline.from_files(
            dit=dit, vae=build.TINY_VAE, t5=build.TINY_T5, tokenizer=build.TINY_TOKENIZER, memory=Elsewhere("cpu")
        )
        dit.touch()
        with pytest.raises(WeightsError, match=r"dit\.safetensors"):
            ours(REQUEST)

    def test_a_batch_of_latents(self, tiny):
        ours = replace(tiny, memory=MemoryPolicy("cpu"))
        latents = torch.randn(2, 12, 2, 5, 7, generator=torch.Generator().manual_seed(0))
        frames = torch.cat(list(ours.decode(latents)), dim=1)
        assert frames.shape == (2, 7, 40, 56, 3)
