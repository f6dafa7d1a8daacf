"""What is said of the VAE's memory is what is counted: never less, and not much more."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.live_bytes import LiveBytes
from mochi_core.config import MOCHI_1, TINY, StagesConfig, VAEConfig
from mochi_core.memory.frames import HostFrames
from mochi_core.memory.vae_need import (
    kept_frames_bytes,
    stagewise_encode_bytes,
    stagewise_encode_host_bytes,
    streaming_decode_bytes,
)
from mochi_core.shapes import LatentSize
from mochi_core.vae import Decoder, Encoder
from mochi_core.vae.causal_conv import VALUES_AT_ONCE, KeptContext


@pytest.fixture(autouse=True)
def inference():
    """Only so does torch leave attention on a fake device in one piece."""
    with torch.inference_mode():
        yield


MEDIUM = VAEConfig(
    decoder=StagesConfig(64, (1, 2, 4, 6), (1, 1, 2, 2, 1), (False,) * 5),
    encoder=StagesConfig(64, (1, 2, 4, 6), (1, 1, 2, 2, 1), (False, True, True, True, True)),
)
FULL = (60, 106)


@pytest.mark.parametrize("keep", (None, 0, 50_000_000))
@pytest.mark.parametrize(
    "config, size, values, frames, most",
    [
        (MOCHI_1.vae, FULL, VALUES_AT_ONCE, 2, 1.25),
        (MOCHI_1.vae, (16, 24), VALUES_AT_ONCE // 16, 2, 1.4),
        (MEDIUM, (16, 16), VALUES_AT_ONCE, 4, 1.3),
        (MEDIUM, (30, 20), 2**20, 3, 1.5),
        (TINY.vae, (8, 8), VALUES_AT_ONCE, 4, 1.5),
    ],
)
def test_streaming_decode(config, size, values, frames, most, keep):
    with FakeTensorMode():
        decoder = Decoder(config, dtype=torch.bfloat16, device="cuda")
        store = None if keep is None else HostFrames("cuda", keep, synchronous=True)
        z = torch.empty(1, 12, frames, *size, dtype=torch.bfloat16, device="cuda")
        with LiveBytes() as live:
            for _ in decoder.stream(z, context=KeptContext(store, values)):
                pass
    said = streaming_decode_bytes(
        config,
        LatentSize(frames, *size),
        frames_on_host=keep is not None,
        kept_on_device=keep or 0,
        values_at_once=values,
    )
    assert live.peak_on["cuda"] <= said <= most * live.peak_on["cuda"]


def test_a_longer_clip_needs_no_more():
    first, second = (streaming_decode_bytes(MOCHI_1.vae, LatentSize(count, *FULL)) for count in (2, 200))
    assert first == second


def test_batches_and_dtypes_count():
    one = streaming_decode_bytes(TINY.vae, LatentSize(3, 8, 8))
    assert streaming_decode_bytes(TINY.vae, LatentSize(3, 8, 8), dtype=torch.float32) == 2 * one
    assert streaming_decode_bytes(TINY.vae, LatentSize(3, 8, 8), batch=2) == 2 * one


def test_the_released_decoder_in_three_gigabytes():
    weights = 2 * 362_526_595
    need = streaming_decode_bytes(MOCHI_1.vae, LatentSize(28, *FULL), frames_on_host=True)
    assert weights + need < 3e9


def test_kept_frames():
    """Two frames for each convolution: 3,248 values a pixel in the released decoder."""
    pixels = 480 * 848
    assert kept_frames_bytes(MOCHI_1.vae, LatentSize(28, *FULL), dtype=torch.bfloat16) == 2 * 3248 * pixels


@pytest.mark.parametrize(
    "config, latents, size, values",
    [(MEDIUM, 3, (8, 8), VALUES_AT_ONCE), (MEDIUM, 5, (4, 8), 2**18), (TINY.vae, 4, (8, 8), 2**16)],
)
def test_stagewise_encode(config, latents, size, values):
    rows, columns = (8 * n for n in size)
    with FakeTensorMode():
        encoder = Encoder(config, dtype=torch.bfloat16, device="cuda")
        video = torch.empty(1, 3, 6 * (latents - 1) + 1, rows, columns)
        with LiveBytes() as live:
            encoder.stagewise(video, torch.bfloat16, device="cuda", values_at_once=values)
    said = LatentSize(latents, *size)
    device = stagewise_encode_bytes(config, said, values_at_once=values)
    assert live.peak_on["cuda"] <= device <= 3 * live.peak_on["cuda"]
    host = stagewise_encode_host_bytes(config, said)
    assert 0.95 * live.peak_on["cpu"] <= host <= 1.5 * live.peak_on["cpu"]
