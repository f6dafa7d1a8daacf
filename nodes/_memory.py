"""Ways to do a decode, an encode or a forward: what each asks of the device, and which one the device has room for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from mochi_core.config import VAEConfig
from mochi_core.memory.vae_need import stagewise_encode_bytes, streaming_decode_bytes
from mochi_core.shapes import PIXELS_PER_LATENT, LatentSize, frames_of
from mochi_core.vae.causal_conv import VALUES_AT_ONCE

# Live values for each pixel of a frame and each latent frame of a decode that is not streamed, counted in the released
# decoder: benchmarks/vae_memory.py. Weights are apart.
FULL_VALUES_PER_PIXEL_AND_LATENT = 3_630

# What kernels take inside themselves, and what the allocator cannot fill, beside the tensors that are counted.
WORKSPACE_BYTES = 512 << 20
UNFILLED = 0.1
# The part of a device's memory that is not ours: its context, the desktop.
NOT_OURS = 0.1

STEP_DOWN = 4


def asked(tensor_bytes: float) -> int:
    """Bytes of device memory in which work that keeps so many bytes of tensors alive can be done."""
    return int(tensor_bytes * (1 + UNFILLED)) + WORKSPACE_BYTES


def usable(total_bytes: float, reserved_bytes: float) -> int:
    """Bytes that we may count on, of a device with `total_bytes` of which the host reserves some."""
    return max(0, int(total_bytes * (1 - NOT_OURS) - reserved_bytes))


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def video_of(shape: Sequence[int]) -> str:
    """What latents of this shape, `B C t h w`, are a video of."""
    batch, _, frames, height, width = shape
    video = f"{width * PIXELS_PER_LATENT}x{height * PIXELS_PER_LATENT}, {frames_of(frames)} frames"
    return video if batch == 1 else f"{batch} times {video}"


@dataclass(frozen=True)
class DecodeWay:
    """One clip, or one tile of it, to frames: `whole`, or streamed with its kept frames here or there.

    `need` is what it asks of the device beside the weights, in bytes.
    """

    config: VAEConfig
    size: LatentSize
    dtype: torch.dtype
    values_at_once: int = VALUES_AT_ONCE
    frames_on_host: bool = False
    whole: bool = False

    @property
    def need(self) -> int:
        if self.whole:
            pixels = self.size.height * self.size.width * PIXELS_PER_LATENT**2
            return asked(FULL_VALUES_PER_PIXEL_AND_LATENT * self.size.frames * pixels * self.dtype.itemsize)
        return asked(
            streaming_decode_bytes(
                self.config,
                self.size,
                dtype=self.dtype,
                frames_on_host=self.frames_on_host,
                values_at_once=self.values_at_once,
            )
        )

    def smaller(self, host_apart: bool) -> "DecodeWay":
        """The way to go on after this one ran out of memory; `host_apart`: the host's memory is not the device's."""
        quarter = self.values_at_once // STEP_DOWN
        return replace(self, values_at_once=quarter, frames_on_host=host_apart, whole=False)

    def __str__(self) -> str:
        if self.whole:
            return "all at once"
        place = "host" if self.frames_on_host else "device"
        return f"streamed{_parts(self.values_at_once)}, kept frames on the {place}"


def decode_ways(
    config: VAEConfig, size: LatentSize, dtype: torch.dtype, *, host_apart: bool, whole: bool
) -> list[DecodeWay]:
    """From the fastest to the one that needs least; the frames are the same."""
    first = DecodeWay(config, size, dtype)
    ways = [replace(first, whole=True)] if whole else []
    ways.append(first)
    if host_apart:
        ways.append(replace(first, frames_on_host=True))
    return [*ways, first.smaller(host_apart)]


@dataclass(frozen=True)
class EncodeWay:
    """One clip to latents. `need` as for a `DecodeWay`."""

    config: VAEConfig
    size: LatentSize
    dtype: torch.dtype
    values_at_once: int = VALUES_AT_ONCE

    @property
    def need(self) -> int:
        return asked(
            stagewise_encode_bytes(self.config, self.size, dtype=self.dtype, values_at_once=self.values_at_once)
        )

    def smaller(self, host_apart: bool) -> "EncodeWay":
        """As `DecodeWay.smaller`."""
        return replace(self, values_at_once=self.values_at_once // STEP_DOWN)

    def __str__(self) -> str:
        return f"stage by stage{_parts(self.values_at_once)}"


def _parts(values_at_once: int) -> str:
    return " in smaller parts" if values_at_once < VALUES_AT_ONCE else ""


def encode_ways(config: VAEConfig, size: LatentSize, dtype: torch.dtype, *, host_apart: bool) -> list[EncodeWay]:
    """From the fastest to the one that needs least; the latents are the same."""
    first = EncodeWay(config, size, dtype)
    return [first, first.smaller(host_apart)]


Way = TypeVar("Way", DecodeWay, EncodeWay)


def fitting(ways: Sequence[Way], available_bytes: float) -> Way:
    """The first of the ways that needs no more than there is, or the last."""
    return next((way for way in ways if way.need <= available_bytes), ways[-1])
