"""Our VAE as the host's VAE, so that its decode and encode nodes and its memory management apply."""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import nn

from mochi_core.errors import WeightsError
from mochi_core.sampling.samplers import draw_noise
from mochi_core.shapes import FRAMES_PER_LATENT, PIXELS_PER_LATENT, LatentSize
from mochi_core.vae import Decoder, Encoder, Posterior
from mochi_core.vae.tiling import decode_tiled
from mochi_core.weights.build import load_vae

from . import _host

# Live values for each pixel of a frame, found by counting tensors in the released decoder and encoder:
# benchmarks/vae_live_memory.py. Weights are apart.
STREAMING_VALUES_PER_PIXEL = 7_600
FULL_VALUES_PER_PIXEL_AND_LATENT = 3_200
ENCODE_VALUES_PER_PIXEL_AND_FRAME = 430

MODES = ("streaming", "full", "tiled spatial")


class FirstStage(nn.Module):
    """Decoder and encoder under one roof; either may be missing. It computes in `dtype`, whatever it is given."""

    def __init__(self, decoder: Decoder | None, encoder: Encoder | None, dtype: torch.dtype, source: str):
        super().__init__()
        self.decoder, self.encoder = decoder, encoder
        self.dtype, self.source = dtype, source

    def decode(self, latents: torch.Tensor, mode: str = "streaming", **tiles: int) -> torch.Tensor:
        """`B 12 t h w` in VAE space -> `B 3 T H W` on the host's output device."""
        if self.decoder is None:
            raise WeightsError(
                f"{self.source} has no decoder", "decoding needs one", "Load decoder.safetensors, or the combined VAE"
            )
        latents, out = latents.to(self.dtype), _host.intermediate_device()
        if mode == "full":
            return self.decoder(latents).to(out)
        if mode == "tiled spatial":
            return decode_tiled(lambda tile: self.decoder(tile).to(out), latents, **tiles)  # pyright: ignore
        advance, pieces = _host.progress_bar(latents.shape[2]), []
        for raw in self.decoder.stream(latents):
            pieces.append(raw.to(out))
            advance()
        return torch.cat(pieces, dim=2)

    def posterior(self, video: torch.Tensor) -> Posterior:
        """`B 3 T H W`, -1 to 1 -> the posterior; frames that do not fill a latent frame are left out, and said."""
        if self.encoder is None:
            raise WeightsError(
                f"{self.source} has no encoder", "encoding needs one", "Load encoder.safetensors, or the combined VAE"
            )
        frames = (video.shape[2] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1
        if frames != video.shape[2]:
            _host.log.warning("encoding the first %d of %d frames: the VAE takes 6k+1", frames, video.shape[2])
        return self.encoder(video[:, :, :frames], self.dtype)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return self.posterior(video).mean


class MochiVAE(comfy.sd.VAE):
    """The host's VAE object around `FirstStage`; decoding streams, so its memory does not grow with the clip."""

    def __init__(self, first_stage: FirstStage):
        with _silenced():
            super().__init__(sd={})
        self.latent_channels = 12
        self.latent_dim = 3
        self.upscale_ratio = (lambda t: max(0, t * 6 - 5), PIXELS_PER_LATENT, PIXELS_PER_LATENT)
        self.upscale_index_formula = (FRAMES_PER_LATENT, PIXELS_PER_LATENT, PIXELS_PER_LATENT)
        self.downscale_ratio = (lambda t: max(0, math.floor((t + 5) / 6)), PIXELS_PER_LATENT, PIXELS_PER_LATENT)
        self.downscale_index_formula = self.upscale_index_formula
        # The first stage rounds to its own dtype after the Fourier features; the host must not do it before.
        self.vae_dtype = torch.float32
        self.working_dtypes = [torch.float32]
        self.first_stage_model = first_stage
        self.device = comfy.model_management.vae_device()
        self.output_device = _host.intermediate_device()
        self.patcher = _host.patcher(first_stage, self.device, comfy.model_management.vae_offload_device())
        self._estimate("streaming")
        self.model_size()

    def for_mode(self, mode: str) -> "MochiVAE":
        """This VAE with the memory estimate of a decode mode."""
        vae = copy.copy(self)
        vae._estimate(mode)
        return vae

    def encode_frames(self, frames: torch.Tensor, seed: int | None) -> torch.Tensor:
        """`T H W 3`, 0 to 1 -> latents, `1 12 t h w`: the posterior's mean, or a draw of `seed`."""
        video = self.process_input(frames.movedim(-1, 0).unsqueeze(0))
        needed = self.memory_used_encode(video.shape, self.vae_dtype)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        posterior = self.first_stage_model.posterior(video.to(self.device))
        latents = posterior.mean
        if seed is not None:
            noise = draw_noise(LatentSize(*latents.shape[2:]), self.latent_channels, seed)
            latents = posterior.sample(noise.to(latents))
        return latents.to(self.output_device).float()

    def _estimate(self, mode: str) -> None:
        size = comfy.model_management.dtype_size(self.first_stage_model.dtype)

        def decode(shape: Any, dtype: torch.dtype) -> float:
            whole = FULL_VALUES_PER_PIXEL_AND_LATENT * shape[2]
            per_pixel = STREAMING_VALUES_PER_PIXEL if mode == "streaming" else whole
            return shape[0] * shape[3] * shape[4] * PIXELS_PER_LATENT**2 * per_pixel * size

        def encode(shape: Any, dtype: torch.dtype) -> float:
            return shape[0] * shape[2] * shape[3] * shape[4] * ENCODE_VALUES_PER_PIXEL_AND_FRAME * size

        self.memory_used_decode, self.memory_used_encode = decode, encode


@contextmanager
def _silenced() -> Iterator[None]:
    """Holds back the host's warning that its constructor found no weights: they come from us."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def load_native_vae(path: str, dtype: torch.dtype | None) -> MochiVAE:
    """The host's VAE object from a file with a decoder, an encoder or both."""
    preferred = comfy.model_management.vae_dtype(comfy.model_management.vae_device(), [torch.bfloat16, torch.float32])
    compute: torch.dtype = dtype or preferred
    vae = load_vae(path, dtype=compute, operations=comfy.ops.disable_weight_init)
    return MochiVAE(FirstStage(vae.decoder, vae.encoder, compute, path))
