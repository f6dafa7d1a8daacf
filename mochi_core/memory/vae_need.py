"""How many bytes the VAE needs beside its weights, from the architecture and the size of the picture.

What is counted are tensors; the workspaces that a device's convolutions ask for come on top.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..config import VAEConfig
from ..shapes import PIXELS_PER_LATENT, LatentSize, frames_of
from ..vae.causal_conv import VALUES_AT_ONCE

# Frames that a 3x3x3 causal convolution keeps.
KEPT_FRAMES = 2
CONVOLUTIONS_A_BLOCK = 2
# How many tensors as large as a part of the clip the encoder has at once.
ENCODER_COPIES = 7


@dataclass(frozen=True)
class _Stage:
    """One size of picture: values of a frame, residual blocks, frames made of one that enters, frames of a piece."""

    frame: int
    channels: int
    rows: int
    columns: int
    blocks: int
    time: int
    frames: int

    @property
    def kept(self) -> int:
        """Values of the frames that one convolution keeps."""
        return KEPT_FRAMES * self.frame


def _stages(config: VAEConfig, height: int, width: int, batch: int) -> Iterator[_Stage]:
    """The decoder's stages from the latents on, as `vae.decoder` has them; one latent frame enters at a time."""
    half = config.decoder
    channels, counts = half.channels[::-1], half.num_res_blocks[::-1]
    times, spaces = (1, *config.temporal_factors[::-1]), (1, *config.spatial_factors[::-1])
    frames, rows, columns = 1, height, width
    for stage, (time, space) in enumerate(zip(times, spaces)):
        frames, rows, columns = frames * time, rows * space, columns * space
        blocks = counts[0] + counts[1] if stage == 0 else counts[stage + 1]
        yield _Stage(batch * channels[stage] * rows * columns, channels[stage], rows, columns, blocks, time, frames)


def kept_frames_bytes(config: VAEConfig, size: LatentSize, *, batch: int = 1, dtype: torch.dtype) -> int:
    """Bytes of all the frames that a streaming decode keeps between pieces, wherever they lie."""
    stages = _stages(config, size.height, size.width, batch)
    return dtype.itemsize * sum(stage.kept * stage.blocks * CONVOLUTIONS_A_BLOCK for stage in stages)


def streaming_decode_bytes(
    config: VAEConfig,
    size: LatentSize,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    frames_on_host: bool = False,
    kept_on_device: int = 0,
    values_at_once: int = VALUES_AT_ONCE,
) -> int:
    """Bytes on the device at the peak of a streaming decode of `size`, whatever its length.

    `frames_on_host` with `kept_on_device` bytes is `memory.frames.HostFrames`; without it every frame that is kept is
    on the device. `values_at_once` is the context's.
    """
    peak, entered, pictures = 0, 0, 0
    for stage in _stages(config, size.height, size.width, batch):
        at_once = max(1, values_at_once // (stage.frame * stage.time)) * stage.time
        part = min(stage.frames, at_once) * stage.frame
        padded, row = part + stage.kept, (part + stage.kept) // stage.rows
        window = padded if padded <= values_at_once else max(values_at_once, row)
        # The border of what is padded; what comes of a band, before it is in its place.
        window += 2 * (row + padded // stage.columns) + (0 if window == padded else window)
        # The input, the normed copy that enters a convolution, the output; what a layer takes and, when frames move,
        # what the one before it left and the next one will take.
        moving = (3 if frames_on_host else 1) * stage.kept
        work = 3 * part + window + moving if stage.blocks else 3 * part
        peak = max(peak, entered + work)
        entered += part
        pictures = 3 * part // stage.channels
    kept = kept_frames_bytes(config, size, batch=batch, dtype=dtype)
    held = min(kept_on_device, kept) if frames_on_host else kept
    # What was handed out last may still be held, and what is next is being made.
    return (peak + 2 * pictures) * dtype.itemsize + held


def stagewise_encode_bytes(
    config: VAEConfig,
    size: LatentSize,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    values_at_once: int = VALUES_AT_ONCE,
) -> int:
    """Bytes on the device at the peak of a stagewise encode of the video of `size`, whatever its length."""
    half, pixels = config.encoder, batch * size.height * size.width * PIXELS_PER_LATENT**2
    frame = pixels * half.channels[0]
    frames = frames_of(size.frames)
    part = min(frames * frame, max(values_at_once, frame))
    # The widest picture's convolutions keep most; those of the next one's first block run in the same go.
    kept = CONVOLUTIONS_A_BLOCK * KEPT_FRAMES * frame * half.num_res_blocks[0]
    kept += CONVOLUTIONS_A_BLOCK * KEPT_FRAMES * half.channels[1] * pixels // config.spatial_factors[0] ** 2
    return dtype.itemsize * (ENCODER_COPIES * part + kept)


def stagewise_encode_host_bytes(
    config: VAEConfig, size: LatentSize, *, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of host memory in which activations wait during a stagewise encode: they grow with the clip."""
    half = config.encoder
    frames = frames_of(size.frames)
    pixels = batch * size.height * size.width * PIXELS_PER_LATENT**2
    attends = [bool(count) and own for count, own in zip(half.num_res_blocks, half.has_attention)]
    # The last two stages have one size of picture.
    attends = [*attends[:-2], attends[-2] or attends[-1]]
    waiting = [0]
    factors = zip(half.channels, (1, *config.temporal_factors), (1, *config.spatial_factors), attends)
    for channels, time, space, waits in factors:
        frames, pixels = (frames - 1) // time + 1, pixels // space**2
        waiting += [channels * frames * pixels] if waits else []
    moments = 2 * config.latent_channels * frames * pixels
    return dtype.itemsize * max(a + b for a, b in itertools.pairwise([*waiting, moments]))
