"""From noise to latents, through the host's own guider."""

from comfy_api.latest import io

from mochi_core.sampling.guidance import RELEASED_SCALE
from mochi_core.sampling.schedule import RELEASED_STEPS, from_levels, linear_quadratic

from . import _checks, _host
from .native_guider import MochiGuider, run

CATEGORY = "Mochi Video/sampling"
NOISE_DEVICES = ("cpu", "gpu, as the reference")


def _cfg_input() -> io.Float.Input:
    return io.Float.Input(
        "cfg",
        default=RELEASED_SCALE,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="How far to follow the prompt: 4.5 to 6 for Mochi 1, 1.5 for FastMochi. 1 skips the negative prompt.",
    )


def _cfg_schedule_input(optional: bool) -> io.String.Input:
    return _host.advanced(
        io.String.Input(
            "cfg_schedule",
            default="",
            optional=optional,
            tooltip="Scales and the steps they hold, such as 6.0*32, 4.5*32. Replaces cfg when not empty.",
        )
    )


class MochiVideoGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoGuider",
            display_name="Mochi Video Guider",
            category=CATEGORY,
            description="Guidance for SamplerCustomAdvanced, with a scale for each step if wanted.",
            search_aliases=["cfg guider", "cfg schedule"],
            inputs=[
                io.Model.Input("model", tooltip="From Mochi Video DiT Loader."),
                io.Conditioning.Input("positive", tooltip="What to show."),
                io.Conditioning.Input("negative", tooltip="What to stay away from; an empty prompt as released."),
                _cfg_input(),
                _cfg_schedule_input(optional=False),
                _host.advanced(
                    io.Boolean.Input(
                        "batch_cfg",
                        default=True,
                        tooltip="Both prompts in one forward when memory allows. Off: one after the other.",
                    )
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, cfg: float | None = None) -> bool | str:
        return _checks.out_of_range(cls, cfg=cfg) or True

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        cfg: float,
        cfg_schedule: str,
        batch_cfg: bool,
    ) -> io.NodeOutput:
        _checks.at_run(cls, cfg=cfg)
        return io.NodeOutput(MochiGuider(model, positive, negative, cfg, cfg_schedule, batch_cfg))


class MochiVideoSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoSampler",
            display_name="Mochi Video Sampler",
            category=CATEGORY,
            description="Makes the video's latents as Mochi 1 was released to do: Euler in float32 along its own "
            "schedule.",
            search_aliases=["ksampler", "mochi sampler", "denoise", "text to video"],
            inputs=[
                io.Model.Input("model", tooltip="From Mochi Video DiT Loader."),
                io.Conditioning.Input("positive", tooltip="What to show."),
                io.Conditioning.Input("negative", tooltip="What to stay away from; an empty prompt as released."),
                io.Latent.Input("latent", tooltip="From Mochi Video Size, or a video's latents with sigmas below 1."),
                io.Int.Input("steps", default=RELEASED_STEPS, min=2, max=1000, tooltip="Fewer are faster and rougher."),
                _cfg_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed, size and files give the same video.",
                ),
                _host.advanced(
                    io.Combo.Input(
                        "noise_device",
                        options=list(NOISE_DEVICES),
                        default=NOISE_DEVICES[0],
                        tooltip="cpu: the same noise on every machine. gpu: what the reference draws for a seed.",
                    )
                ),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Other noise levels: they replace steps."),
                _cfg_schedule_input(optional=True),
            ],
            outputs=[io.Latent.Output(tooltip="Latents in VAE space, for Mochi Video Decode.")],
        )

    @classmethod
    def validate_inputs(cls, noise_device: str | None = None) -> bool | str:
        return _checks.not_among(noise_device=(noise_device, NOISE_DEVICES)) or True

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        latent: io.Latent.Type,
        steps: int,
        cfg: float,
        seed: int,
        noise_device: str,
        sigmas: io.Sigmas.Type | None = None,
        cfg_schedule: str = "",
    ) -> io.NodeOutput:
        _checks.at_run(cls, noise_device=noise_device, cfg=cfg)
        schedule = linear_quadratic(steps) if sigmas is None else from_levels(sigmas.tolist())
        if sigmas is not None and schedule.steps != steps:
            _host.log.info("sigmas replace steps: %d steps instead of %d", schedule.steps, steps)
        if cfg_schedule.strip():
            _host.log.info("cfg_schedule replaces cfg: %s instead of %s", cfg_schedule, cfg)
        guider = MochiGuider(model, positive, negative, cfg, cfg_schedule, batch_cfg=True)
        return io.NodeOutput(run(guider, dict(latent), schedule, seed, noise_device))
