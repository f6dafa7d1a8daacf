"""What is said of memory is what is counted."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from benchmarks.streaming_plan import Case, counted
from mochi_core.config import MOCHI_1, TINY, DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.memory.need import (
    dit_activations,
    t5_activations,
)
from mochi_core.shapes import LatentSize, VideoSize
from mochi_core.text.t5 import empty_t5

FULL = VideoSize(848, 480, 163).latent
RELEASED = replace(MOCHI_1.dit, depth=2)  # blocks are alike
SMALL = LatentSize(2, 12, 14)


@pytest.mark.parametrize(
    "config, size, tokens_at_once, options",
    [
        (RELEASED, (848, 480, 163), None, {}),
        (RELEASED, (848, 480, 163), 4096, {}),
        (RELEASED, (848, 480, 163), 16384, {}),
        (RELEASED, (640, 352, 61), 1024, dict(text_tokens=20)),
        (RELEASED, (432, 240, 31), None, dict(dtype=torch.float32)),
        (RELEASED, (432, 240, 31), 1024, dict(dtype=torch.float32)),
        (RELEASED, (848, 480, 1), None, dict(batch=2)),
        (RELEASED, (848, 480, 1), 1024, {}),
        (RELEASED, (64, 64, 1), None, {}),
        (RELEASED, (64, 64, 1), 1024, {}),
        (TINY.dit, (256, 256, 31), None, {}),
        (TINY.dit, (256, 256, 31), 1024, {}),
        (DiTConfig(depth=2, heads=6, visual_dim=768, text_dim=384, visual_mlp_ratio=2.0), (432, 240, 31), None, {}),
    ],
)
def test_a_forward_of_the_dit(config, size, tokens_at_once, options):
    case = Case(config, VideoSize(*size).latent, tokens_at_once=tokens_at_once, **{"dtype": torch.bfloat16, **options})
    true = max(counted(case).values())
    assert true <= case.need() <= 1.05 * true


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("counts", [(20,), (20, 20), (20, 7)], ids=str)
@pytest.mark.parametrize("tokens_at_once", (None, 1024))
def test_a_forward_that_really_runs(randomised, counts, tokens_at_once):
    """On the CPU, with real masks; a ragged batch takes its samples apart."""
    config, size = replace(TINY.dit, depth=2), LatentSize(5, 32, 32)
    dit, batch = randomised(AsymmDiT(config)), len(counts)
    dit.tokens_at_once = tokens_at_once
    with LiveBytes() as live:
        latents = torch.ones(batch, 12, 5, 32, 32)
        mask = torch.arange(20) < torch.tensor(counts)[:, None]
        dit(latents, torch.ones(batch), torch.ones(batch, 20, config.text_feature_dim), mask)
    options = dict(batch=batch, text_tokens=20, dtype=torch.float32, tokens_at_once=tokens_at_once)
    need = dit_activations(config, size, **options)
    ragged_or_alone = batch == 1 or len(set(counts)) == 2
    assert live.peak <= need <= (1.05 if ragged_or_alone else 1.25) * live.peak


@pytest.mark.parametrize("config", (replace(MOCHI_1.text, num_layers=2), TINY.text), ids=("released", "tiny"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("tokens", (64, 256))
def test_a_forward_of_the_t5(config, dtype, tokens):
    t5 = empty_t5(config).to(dtype).eval()
    t5.set_attn_implementation("eager")
    # On the meta device storages have sizes too; what is asked of a mask is told.
    with torch.inference_mode(), mock.patch.object(torch.Tensor, "all", lambda mask: False), LiveBytes() as live:
        ids, mask = (torch.ones(1, tokens, dtype=torch.int64, device="meta") for _ in range(2))
        t5(ids, attention_mask=mask)
    need = t5_activations(config, tokens=tokens, dtype=dtype)
    # In so small a network other things come first, and none of them matters.
    assert live.peak <= need <= (1.05 if config.d_model == 4096 else 1.4) * live.peak
