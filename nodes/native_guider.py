"""The host's CFG guider with a scale for each step, and its sampling run with our checks around it."""

from typing import Any

import comfy.samplers
import torch

from mochi_core.errors import ConditioningError
from mochi_core.latents import require_finite
from mochi_core.sampling.guidance import constant, parse_schedule
from mochi_core.sampling.samplers import draw_noise
from mochi_core.sampling.schedule import SigmaSchedule, from_levels
from mochi_core.shapes import LatentSize

from . import _host
from ._runs import RUNS, Run, Steps
from .native_dit import MochiModel, check_features, described_run
from .native_events import bar_moved, previewed


class MochiGuider(comfy.samplers.CFGGuider):
    """Guidance whose scale follows a schedule; wrappers, patches, LoRA and previews of the host apply."""

    def __init__(self, model: Any, positive: Any, negative: Any, cfg: float, cfg_schedule: str, batch_cfg: bool):
        super().__init__(model)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            if not conditioning:
                raise ConditioningError(
                    f"The {name} conditioning is empty", "there must be a prompt", "Connect a text encode node"
                )
            for features, _ in conditioning:
                check_features(model.model, features)
        self.set_conds(positive, negative)
        self.set_cfg(cfg)
        self.cfg_schedule, self.batch_cfg = cfg_schedule, batch_cfg
        self.scales: tuple[float, ...] = ()

    def scales_for(self, steps: int) -> tuple[float, ...]:
        """Raises `ScheduleError` when the CFG schedule does not cover exactly `steps` steps."""
        if self.cfg_schedule.strip():
            return parse_schedule(self.cfg_schedule, steps)
        return constant(self.cfg, steps)

    def sample(
        self,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        callback: Any = None,
        *rest: Any,
        **named: Any,
    ):
        """The host's run, refused before anything loads when schedules or latents are wrong; the page sees it move."""
        schedule = from_levels(sigmas.tolist())
        self.scales = self.scales_for(schedule.steps)
        require_finite(latent_image, "The latents to start from")
        if isinstance(self.model_patcher.model, MochiModel) and latent_image.ndim == 5:
            _host.log.info("%s", described_run(self.model_patcher, latent_image.shape, schedule.steps))
        steps = Steps()
        callback = steps.timed(previewed(callback, self.model_patcher.model.latent_format))
        samples = super().sample(noise, latent_image, sampler, sigmas, denoise_mask, callback, *rest, **named)
        require_finite(samples, "The sampled latents")
        self._remember(samples, steps)
        return samples

    def _remember(self, samples: torch.Tensor, steps: Steps) -> None:
        """How long a step took, for what the page says of the next run."""
        model = self.model_patcher.model
        if isinstance(model, MochiModel) and samples.ndim == 5 and steps.median is not None:
            size = LatentSize(*samples.shape[2:])
            RUNS.remember(Run(model.diffusion_model.config, size, len(samples), steps.median))

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any] = {}, seed: Any = None
    ):
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        # Samplers of higher order also ask between two levels: that is still the earlier one's step.
        step = int((sigmas > timestep.max() * (1 + 1e-6)).sum())
        self.cfg = self.scales[min(step, len(self.scales) - 1)]
        if not self.batch_cfg:
            model_options = {**model_options, "sampler_calc_cond_batch_function": _one_by_one}
        return super().predict_noise(x, timestep, model_options, seed)


def _one_by_one(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Each prompt in a forward of its own."""
    model, x, sigma, options = (arguments[name] for name in ("model", "input", "sigma", "model_options"))
    return [
        comfy.samplers.calc_cond_batch(model, [cond], x, sigma, options)[0] if cond is not None else torch.zeros_like(x)
        for cond in arguments["conds"]
    ]


def run(guider: MochiGuider, latent: dict[str, Any], schedule: SigmaSchedule, seed: int, noise_device: str) -> dict:
    """Euler in float32 through the host; returns the latents with their samples replaced."""
    model = guider.model_patcher
    samples = _host.fitted_latents(model, latent["samples"])
    noise = _noise(samples, seed, noise_device, latent.get("batch_index"))
    out = guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object("euler"),
        _host.sigmas_tensor(schedule),
        denoise_mask=latent.get("noise_mask"),
        callback=bar_moved(),
        disable_pbar=not _host.progress_bars_enabled(),
        seed=seed,
    )
    return {**latent, "samples": out.to(_host.intermediate_device())}


def _noise(samples: torch.Tensor, seed: int, device: str, batch_index: list[int] | None) -> torch.Tensor:
    """Noise for each sample; `batch_index` names their places in the batch they were taken from."""
    places = batch_index or list(range(len(samples)))
    size = LatentSize(*samples.shape[2:])
    noise = draw_noise(size, samples.shape[1], seed, batch=max(places) + 1, device=_host.noise_device(device))
    return noise[places].to("cpu")
