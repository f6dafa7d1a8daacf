"""Text to latents to frames, with the parts in hand.

pipeline = MochiPipeline.tiny()
frames = pipeline(TextToVideo("a red circle moving right on a black background"))
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .dit import AsymmDiT
from .errors import ConditioningError, LatentsError
from .latents import LatentStatistics, require_finite
from .progress import Progress, silent
from .sampling.guidance import RELEASED_SCALE, Guidance, checked, constant
from .sampling.samplers import draw_noise, euler
from .sampling.schedule import RELEASED_STEPS, SigmaSchedule, linear_quadratic
from .shapes import VideoSize
from .text.conditioning import TextConditioning, TextEncoder
from .vae import Decoder
from .vae.decoder import to_frames
from .weights import build


@dataclass(frozen=True)
class TextToVideo:
    """All that decides a video. `cfg` is one scale, or one for each step."""

    prompt: str
    negative: str = ""
    size: VideoSize = VideoSize(848, 480, 163)
    schedule: SigmaSchedule = field(default_factory=lambda: linear_quadratic(RELEASED_STEPS))
    cfg: float | Sequence[float] = RELEASED_SCALE
    seed: int = 0
    noise_device: str = "cpu"
    batched_cfg: bool = False

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scale of each step. Raises `ScheduleError` when they do not match the schedule."""
        steps = self.schedule.steps
        return checked(self.cfg, steps) if isinstance(self.cfg, Sequence) else constant(self.cfg, steps)


@dataclass(frozen=True)
class MochiPipeline:
    """The three networks and the DiT's latent statistics. Runs each network where its parameters are.

    Raises `ConditioningError` or `LatentsError` when the parts do not belong together.
    """

    text_encoder: TextEncoder
    dit: AsymmDiT
    decoder: Decoder
    statistics: LatentStatistics

    def __post_init__(self) -> None:
        given, read = self.text_encoder.width, self.dit.config.text_feature_dim
        if given != read:
            raise ConditioningError(
                f"The T5 gives features of width {given}",
                f"this DiT reads features of width {read}",
                "Load the T5 that belongs to this DiT",
            )

        channels = self.dit.config.latent_channels
        if len(self.statistics.mean) != channels:
            raise LatentsError(
                f"The latent statistics have {len(self.statistics.mean)} channels",
                f"this DiT makes latents of {channels}",
                "Use the statistics that were loaded with it",
            )

    @classmethod
    def tiny(cls, dtype: torch.dtype = torch.float32) -> "MochiPipeline":
        """The embedded small checkpoint: 64x64, 13 or 19 frames, seconds on any CPU."""
        dit, statistics = build.load_dit(build.TINY_DIT, dtype=dtype)
        decoder = build.load_vae(build.TINY_VAE, dtype=dtype).decoder
        assert decoder is not None  # our own asset
        text_encoder = TextEncoder(build.load_t5(build.TINY_T5, dtype=dtype), build.load_tiny_tokenizer())
        return cls(text_encoder, dit, decoder, statistics)

    def __call__(self, request: TextToVideo, progress: Progress = silent) -> torch.Tensor:
        """The video: `T H W 3`, 0 to 1, float32, on the CPU. Raises `MochiError` kinds before any network runs."""
        latents = self.sample(request, progress)
        return torch.cat(list(self.decode(latents)), dim=1)[0]

    @torch.inference_mode()
    def sample(self, request: TextToVideo, progress: Progress = silent) -> torch.Tensor:
        """Latents in VAE space, `1 C T H W`, float32."""
        scales = request.scales
        positive, negative = (self.text_encoder([prompt]) for prompt in (request.prompt, request.negative))
        guidance = Guidance(self.predict, positive, negative, scales, request.batched_cfg)
        channels = self.dit.config.latent_channels
        noise = draw_noise(request.size.latent, channels, request.seed, device=request.noise_device)
        noise = noise.to(next(self.dit.parameters()).device)
        return self.statistics.to_vae_space(euler(guidance, noise, request.schedule, progress))

    def predict(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: TextConditioning) -> torch.Tensor:
        """The DiT in its own dtype on its own device."""
        parameter = next(self.dit.parameters())
        features, mask = (x.to(parameter.device) for x in (conditioning.features, conditioning.mask))
        return self.dit(latents.to(parameter), sigma, features, mask)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Pieces of the video, in order, as they are ready: `B T H W 3`, 0 to 1, on the CPU."""
        require_finite(latents, "The latents to decode")
        for raw in self.decoder.stream(latents.to(next(self.decoder.parameters()))):
            yield to_frames(raw).cpu()
