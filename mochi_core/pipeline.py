"""Text to latents to frames, with the parts in hand.

pipeline = MochiPipeline.tiny()
frames = pipeline(TextToVideo("a red circle moving right on a black background"))
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .dit import AsymmDiT
from .errors import ConditioningError, LatentsError
from .latents import LatentStatistics, require_finite
from .memory.borrowing import Check, on_device
from .memory.plan import MemoryPolicy, NetworkPlan, Networks, Plan, decode_context, decode_plan, placed
from .progress import Progress, silent
from .sampling.guidance import RELEASED_SCALE, Guidance, checked, constant
from .sampling.samplers import draw_noise, euler
from .sampling.schedule import RELEASED_STEPS, SigmaSchedule, linear_quadratic
from .shapes import LatentSize, VideoSize
from .text.conditioning import TextConditioning, TextEncoder
from .text.tokenizer import read_tokenizer
from .vae import Decoder
from .vae.decoder import to_frames
from .weights import build
from .weights.files import Unchanged


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
    """The three networks and the DiT's latent statistics.

    Each network runs where its parameters are. With a `memory` policy they are brought to its device one after the
    other, as much of them as fits, and the rest is streamed; `files` are those that weights may be mapped from.

    Raises `ConditioningError` or `LatentsError` when the parts do not belong together.
    """

    text_encoder: TextEncoder
    dit: AsymmDiT
    decoder: Decoder
    statistics: LatentStatistics
    memory: MemoryPolicy | None = None
    files: tuple[Unchanged, ...] = ()

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
    def from_files(
        cls,
        *,
        dit: str | Path,
        vae: str | Path,
        t5: str | Path,
        tokenizer: str | Path,
        dtype: torch.dtype | None = None,
        memory: MemoryPolicy | None = None,
    ) -> "MochiPipeline":
        """From files or folders in any layout; see `weights.build`. Weights stay mapped unless `dtype` is another one.

        Raises `WeightsError` or `ConfigError` when a file is broken, incomplete or of another model.
        """
        files = tuple(Unchanged(path) for path in (dit, vae, t5))
        network, statistics = build.load_dit(dit, dtype=dtype)
        decoder = build.load_decoder(vae, dtype=dtype)
        text_encoder = TextEncoder(build.load_t5(t5, dtype=dtype), read_tokenizer(tokenizer))
        return cls(text_encoder, network, decoder, statistics, memory, files)

    @classmethod
    def tiny(cls, dtype: torch.dtype = torch.float32, memory: MemoryPolicy | None = None) -> "MochiPipeline":
        """The embedded small checkpoint: 64x64, 7 to 25 frames, seconds on any CPU."""
        return cls.from_files(
            dit=build.TINY_DIT,
            vae=build.TINY_VAE,
            t5=build.TINY_T5,
            tokenizer=build.TINY_TOKENIZER,
            dtype=dtype,
            memory=memory,
        )

    def plan(self, request: TextToVideo) -> Plan | None:
        """What the memory policy makes of a request, None without a policy.

        Raises `MemoryBudgetError`, which says the least that will do.
        """
        if self.memory is None:
            return None
        networks = Networks(self.text_encoder.model, self.dit, self.decoder)
        return self.memory.plan(request.size, networks, batch=2 if request.batched_cfg else 1)

    def __call__(self, request: TextToVideo, progress: Progress = silent) -> torch.Tensor:
        """The video: `T H W 3`, 0 to 1, float32, on the CPU. Raises `MochiError` kinds, those of the
        request before any network runs."""
        latents = self.sample(request, progress)
        return torch.cat(list(self.decode(latents)), dim=1)[0]

    @torch.inference_mode()
    def sample(self, request: TextToVideo, progress: Progress = silent) -> torch.Tensor:
        """Latents in VAE space, `1 C T H W`, float32."""
        scales, plan = request.scales, self.plan(request)
        encoder = self.text_encoder.model
        with self._placed(encoder, encoder.encoder.block, plan and plan.text):
            positive, negative = (self.text_encoder([prompt]) for prompt in (request.prompt, request.negative))
        guidance = Guidance(self.predict, positive, negative, scales, request.batched_cfg)
        channels = self.dit.config.latent_channels
        noise = draw_noise(request.size.latent, channels, request.seed, device=request.noise_device)
        with self._placed(self.dit, self.dit.blocks, plan and plan.dit):
            noise = noise.to(next(self.dit.parameters()).device)
            return self.statistics.to_vae_space(euler(guidance, noise, request.schedule, progress))

    def predict(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: TextConditioning) -> torch.Tensor:
        """The DiT in its own dtype on its own device."""
        parameter = next(self.dit.parameters())
        features, mask = (x.to(parameter.device) for x in (conditioning.features, conditioning.mask))
        return self.dit(latents.to(parameter), sigma, features, mask)

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Pieces of the video, in order, as they are ready: `B T H W 3`, 0 to 1, on the CPU."""
        return decode(self.decoder, latents, self.memory, self._check_files)

    def _placed(self, network: nn.Module, blocks: Any, how: NetworkPlan | None) -> AbstractContextManager[object]:
        if how is None or self.memory is None:
            return nullcontext()
        return placed(network, blocks, how, self.memory.device, self._check_files)

    def _check_files(self) -> None:
        for unchanged in self.files:
            unchanged()


@torch.inference_mode()
def decode(
    decoder: Decoder, latents: torch.Tensor, memory: MemoryPolicy | None = None, check: Check | None = None
) -> Iterator[torch.Tensor]:
    """Pieces of the video, in order, as they are ready: `B T H W 3`, 0 to 1, on the CPU.

    `latents`: `B C T h w` in VAE space. `memory` as for `MochiPipeline`; `check` as for `memory.blocks.streamed`.
    Raises `LatentsError` on latents of another model or with values that are no numbers, and `MemoryBudgetError`.
    """
    require_finite(latents, "The latents to decode")
    decoder.check(latents)
    with ExitStack() as stack:
        context = None
        if memory is not None:
            size = LatentSize(*latents.shape[2:])
            how = decode_plan(decoder, size, memory.budget_now, memory.device, batch=len(latents))
            stack.enter_context(on_device(decoder, memory.device, check=check))
            context = stack.enter_context(decode_context(how, memory.device))
        for raw in decoder.stream(latents.to(next(decoder.parameters())), context=context):
            yield to_frames(raw).cpu()
