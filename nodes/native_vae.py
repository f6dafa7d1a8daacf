"""Our VAE as the host's VAE, so that its decode and encode nodes and its memory management apply.

Decoding streams, exactly, and encoding goes stage by stage: neither needs tiles, whatever the size, and what they ask
of the device does not grow with the clip. The host's tiles and what it does when memory runs out never come to run.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import nn

from mochi_core.config import VAEConfig
from mochi_core.errors import MemoryBudgetError, WeightsError
from mochi_core.memory.frames import HostFrames
from mochi_core.memory.vae_need import stagewise_encode_host_bytes
from mochi_core.sampling.samplers import draw_noise
from mochi_core.shapes import FRAMES_PER_LATENT, PIXELS_PER_LATENT, LatentSize, frames_of, whole_frames
from mochi_core.vae import Decoder, Encoder, Posterior
from mochi_core.vae.causal_conv import KeptContext
from mochi_core.weights.build import load_vae

from . import _host
from ._autosave import autosaved
from ._memory import DecodeWay, EncodeWay, Way, decode_ways, encode_ways, fitting, gigabytes, video_of
from ._tiles import TILERS, DecodeOptions, largest

Result = TypeVar("Result")


class FirstStage(nn.Module):
    """Decoder and encoder under one roof; either may be missing. It computes in `dtype`, whatever it is given."""

    def __init__(self, decoder: Decoder | None, encoder: Encoder | None, dtype: torch.dtype, source: str):
        super().__init__()
        self.decoder, self.encoder = decoder, encoder
        self.dtype, self.source = dtype, source

    def needed_decoder(self) -> Decoder:
        if self.decoder is None:
            raise WeightsError(
                f"{self.source} has no decoder", "decoding needs one", "Load decoder.safetensors, or the combined VAE"
            )
        return self.decoder

    def needed_encoder(self) -> Encoder:
        if self.encoder is None:
            raise WeightsError(
                f"{self.source} has no encoder", "encoding needs one", "Load encoder.safetensors, or the combined VAE"
            )
        return self.encoder

    @property
    def config(self) -> VAEConfig:
        return (self.decoder or self.needed_encoder()).config

    def pieces(self, latents: torch.Tensor, way: DecodeWay) -> Iterator[torch.Tensor]:
        """`B 12 t h w` in VAE space -> `B 3 T H W` in consecutive pieces, where the latents are."""
        decoder, latents = self.needed_decoder(), latents.to(self.dtype)
        if way.whole:
            yield decoder(latents)
            return
        store = HostFrames(latents.device) if way.frames_on_host else None
        try:
            yield from decoder.stream(latents, context=KeptContext(store, way.values_at_once))
        finally:
            if store is not None:
                store.close()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """For nodes that call it past the VAE: `B 12 t h w` -> `B 3 T H W` on the host's output device."""
        way = DecodeWay(self.config, LatentSize(*latents.shape[2:]), self.dtype)
        return torch.cat([raw.to(_host.intermediate_device()) for raw in self.pieces(latents, way)], dim=2)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """The same for `B 3 T H W`, -1 to 1: the posterior's mean."""
        return self.needed_encoder().stagewise(video, self.dtype).mean


class MochiVAE(comfy.sd.VAE):
    """The host's VAE object around `FirstStage`."""

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
        self.model_size()
        # Functions that hold on to no VAE: one that held on to itself would go late.
        self.memory_used_decode = partial(_decode_need, first_stage, self.device, self.size)
        self.memory_used_encode = partial(_encode_need, first_stage, self.device, self.size)

    # Decoding

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] = {}) -> torch.Tensor:
        """`B 12 t h w` in VAE space -> `B T H W 3`, 0 to 1, on the host's output device.

        `vae_options` are those of `DecodeOptions`. The latents are kept on disk until it is done. Raises `MochiError`
        kinds on latents or options that do not fit, and when memory runs out twice.
        """
        first_stage: FirstStage = self.first_stage_model
        decoder = first_stage.needed_decoder()
        decoder.check(samples_in)
        size, options = LatentSize(*samples_in.shape[2:]), DecodeOptions(**vae_options)
        tiles = options.tiles(size)
        ways = _decode_ways(first_stage, self.device, largest(tiles), whole=options.mode == "full")
        with autosaved(samples_in, _host.output_folder(), _host.interruptions()):
            return self._within_memory(
                f"{options.mode} decode of {video_of(samples_in.shape)}",
                ways,
                lambda way: self._decoded(samples_in, way, options, len(tiles)),
            )

    def decode_tiled(self, samples: torch.Tensor, *tiles: Any, **more: Any) -> torch.Tensor:
        """What the host's tiled decode node asks for: the exact decode."""
        _host.log.info("This VAE decodes any size exactly without tiles: tile sizes are not used.")
        return self.decode(samples)

    def decode_tiled_3d(self, samples: torch.Tensor, *tiles: Any, **more: Any) -> torch.Tensor:
        """The same as `B 3 T H W`."""
        return self.decode_tiled(samples).movedim(-1, 1)

    def _decoded(self, latents: torch.Tensor, way: DecodeWay, options: DecodeOptions, tile_count: int) -> torch.Tensor:
        """One clip after the other: together they would need more and be no faster."""
        first_stage: FirstStage = self.first_stage_model
        count, (height, width) = frames_of(latents.shape[2]), latents.shape[3:]
        shape = (len(latents), count, height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT, 3)
        frames = torch.empty(shape, dtype=self._output_dtype(), device=self.output_device)
        report, done, total = _host.progress(), 0, len(latents) * tile_count * count

        def stream(latents: torch.Tensor) -> Iterator[torch.Tensor]:
            nonlocal done
            report(done, total)
            for raw in first_stage.pieces(latents, way):
                yield raw.to(self.output_device).float()
                done += raw.shape[2]
                report(done, total)

        def place(target: torch.Tensor, raw: torch.Tensor) -> None:
            target.copy_(self.process_output(raw)[0].movedim(0, -1))

        for clip, target in zip(latents.split(1), frames):
            clip = clip.to(self.device, first_stage.dtype)
            if options.mode in TILERS:
                place(target, options.tiled(lambda tile: torch.cat(list(stream(tile)), dim=2), clip))
                continue
            at = 0
            for raw in stream(clip):
                place(target[at : at + raw.shape[2]], raw)
                at += raw.shape[2]
        return frames

    # Encoding

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """`T H W 3`, or a batch of them, 0 to 1 -> the posterior's mean, `B 12 t h w`."""
        return torch.cat([self._posterior(clip).mean for clip in self._clips(pixel_samples)]).to(self._output_dtype())

    def encode_tiled(self, pixel_samples: torch.Tensor, *tiles: Any, **more: Any) -> torch.Tensor:
        """What the host's tiled encode node asks for: the exact encode."""
        _host.log.info("This VAE encodes any size exactly without tiles: tile sizes are not used.")
        return self.encode(pixel_samples)

    def encode_tiled_3d(self, samples: torch.Tensor, *tiles: Any, **more: Any) -> torch.Tensor:
        """The same of `B 3 T H W`."""
        return self.encode_tiled(samples.movedim(1, -1))

    def encode_frames(self, frames: torch.Tensor, seed: int | None) -> torch.Tensor:
        """`T H W 3`, 0 to 1 -> latents, `1 12 t h w`: the posterior's mean, or a draw of `seed`."""
        (clip,) = self._clips(frames)
        posterior = self._posterior(clip)
        latents = posterior.mean
        if seed is not None:
            noise = draw_noise(LatentSize(*latents.shape[2:]), self.latent_channels, seed)
            latents = posterior.sample(noise.to(latents))
        return latents.to(self.output_device).float()

    def _clips(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        """The host's frames as clips of their own, `1 3 T H W`, cropped to whole latent pixels."""
        clips = pixels if pixels.ndim == 5 else pixels.unsqueeze(0)
        # As single pictures: of a batch of clips the host would crop the frames too.
        cropped = self.vae_encode_crop_pixels(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        return cropped.movedim(-1, 1).split(1)

    def _posterior(self, clip: torch.Tensor) -> Posterior:
        """Of `1 3 T H W`, 0 to 1; frames that do not fill a latent frame are left out, and said."""
        first_stage: FirstStage = self.first_stage_model
        encoder = first_stage.needed_encoder()
        frames = whole_frames(clip.shape[2])
        if frames != clip.shape[2]:
            _host.log.warning("encoding the first %d of %d frames: the VAE takes 6k+1", frames, clip.shape[2])
        video = self.process_input(clip[:, :3, :frames].float()).to(self.output_device)
        encoder.check(video)
        size = _latent_size(video.shape)
        waiting = gigabytes(stagewise_encode_host_bytes(encoder.config, size, dtype=first_stage.dtype))
        latents = (1, self.latent_channels, size.frames, size.height, size.width)
        return self._within_memory(
            f"encode of {video_of(latents)}",
            _encode_ways(first_stage, self.device, size),
            lambda way: encoder.stagewise(
                video,
                first_stage.dtype,
                device=self.device,
                values_at_once=way.values_at_once,
                report=_host.progress(),
            ),
            note=f", {waiting} on the host",
        )

    # Memory

    def _within_memory(self, job: str, ways: Sequence[Way], run: Callable[[Way], Result], note: str = "") -> Result:
        """`run` in the first of the ways that the device has room for, and once more in a smaller one if that was not
        so. Raises `MemoryBudgetError` the second time."""
        host_apart, available = _host.host_apart(self.device), _room(self.device, self.size)
        way, free = fitting(ways, available), 0
        for first_time in (True, False):
            try:
                with _host.on_device(self.device):
                    comfy.model_management.load_models_gpu(
                        [self.patcher], memory_required=way.need, force_full_load=self.disable_offload
                    )
                    free = _host.free_memory(self.patcher, self.device)
                    if first_time:
                        way = fitting(ways, min(available, free))
                    _host.log.info(
                        "%s: %s; needs about %s%s beside %s of weights, %s are free",
                        job, way, gigabytes(way.need), note, gigabytes(self.size), gigabytes(free),
                    )  # fmt: skip
                    return run(way)
            except Exception as error:
                if not _host.out_of_memory(error):
                    raise
            # Not before: the exception keeps alive what was on the device.
            _host.empty_cache()
            if first_time:
                way = way.smaller(host_apart)
                _host.log.warning("%s ran out of memory; once more from the start, %s", job, way)
        raise MemoryBudgetError(
            f"The {job} ran out of memory twice, the second time with {gigabytes(free)} free",
            f"it needs about {gigabytes(way.need)} beside {gigabytes(self.size)} of weights, {way}",
            "Close other programs that use the device, or make a smaller picture",
        )

    def _output_dtype(self) -> torch.dtype:
        return getattr(super(), "vae_output_dtype", lambda: torch.float32)()


def _decode_ways(first_stage: FirstStage, device: torch.device, size: LatentSize, *, whole: bool) -> list[DecodeWay]:
    apart = _host.host_apart(device)
    return decode_ways(first_stage.config, size, first_stage.dtype, host_apart=apart, whole=whole)


def _encode_ways(first_stage: FirstStage, device: torch.device, size: LatentSize) -> list[EncodeWay]:
    return encode_ways(first_stage.config, size, first_stage.dtype, host_apart=_host.host_apart(device))


def _room(device: torch.device, weights: int) -> int:
    """Bytes that the device can have beside the VAE's weights, when all else is moved out."""
    return _host.usable_memory(device) - weights


def _decode_need(first_stage: FirstStage, device: torch.device, weights: int, shape: Any, dtype: torch.dtype) -> int:
    """What a decode of latents of this shape will ask of the device, for the host."""
    ways = _decode_ways(first_stage, device, LatentSize(*shape[2:]), whole=False)
    return fitting(ways, _room(device, weights)).need


def _encode_need(first_stage: FirstStage, device: torch.device, weights: int, shape: Any, dtype: torch.dtype) -> int:
    """The same for an encode of `B 3 T H W`."""
    return fitting(_encode_ways(first_stage, device, _latent_size(shape)), _room(device, weights)).need


def _latent_size(shape: Sequence[int]) -> LatentSize:
    """Of a clip `B 3 T H W` of whole latent pixels."""
    frames, height, width = shape[2:]
    return LatentSize((frames - 1) // FRAMES_PER_LATENT + 1, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)


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
