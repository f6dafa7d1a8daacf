"""Noise levels for the host's samplers."""

from comfy_api.latest import io

from mochi_core.errors import ScheduleError
from mochi_core.sampling.schedule import RELEASED_STEPS, RELEASED_THRESHOLD, SigmaSchedule, last_part, linear_quadratic

from . import _checks, _host

# threshold, and the share of the steps that is linear; FastMochi was distilled for 6 linear steps of 8
PRESETS = {"custom": None, "Mochi 1 (released)": (RELEASED_THRESHOLD, 1 / 2), "FastMochi (8 steps)": (0.1, 3 / 4)}


def chosen_schedule(
    preset: str, steps: int, threshold_noise: float, linear_steps: int, denoise: float
) -> SigmaSchedule:
    """The schedule that the widgets mean. Raises `ScheduleError` when they make none."""
    if not 0 < denoise <= 1:
        raise ScheduleError(f"denoise is {denoise}", "it must be above 0 and at most 1", "Use 1 to start from noise")
    total = int(steps / denoise)
    fixed = PRESETS[preset]
    threshold, linear = (threshold_noise, linear_steps or None) if fixed is None else (fixed[0], int(total * fixed[1]))
    return last_part(linear_quadratic(total, threshold=threshold, linear_steps=linear), steps)


class MochiVideoSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoSigmas",
            display_name="Mochi Video Sigmas",
            category="Mochi Video/sampling",
            description="The noise levels that Mochi was released with: they creep at first, then fall.",
            search_aliases=["scheduler", "linear quadratic", "fastmochi", "noise schedule"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="Mochi 1 (released)",
                    tooltip="As released, as FastMochi was distilled, or custom for the two values below.",
                ),
                io.Int.Input(
                    "steps", default=RELEASED_STEPS, min=2, max=1000, tooltip="How many steps the sampler takes."
                ),
                _host.advanced(
                    io.Float.Input(
                        "threshold_noise",
                        default=RELEASED_THRESHOLD,
                        min=0.001,
                        max=0.999,
                        step=0.001,
                        round=0.001,
                        tooltip="Custom: how much noise the linear steps remove in all.",
                    )
                ),
                _host.advanced(
                    io.Int.Input(
                        "linear_steps",
                        default=0,
                        min=0,
                        max=999,
                        tooltip="Custom: how many steps creep. 0: half of them.",
                    )
                ),
                _host.advanced(
                    io.Float.Input(
                        "denoise",
                        default=1.0,
                        min=0.01,
                        max=1.0,
                        step=0.01,
                        tooltip="Below 1: the last part of a longer schedule, for starting from a video: 0.2 to 0.4. "
                        "From 0.5 on next to nothing of the video is kept.",
                    )
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For Mochi Video Sampler or SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        preset: str | None = None,
        steps: int | None = None,
        threshold_noise: float | None = None,
        linear_steps: int | None = None,
        denoise: float | None = None,
    ) -> bool | str:
        numbers = {"steps": steps, "linear_steps": linear_steps, "denoise": denoise}
        return (
            _checks.not_among(preset=(preset, PRESETS))
            or _checks.out_of_range(cls, **numbers, threshold_noise=threshold_noise)
            or _checks.refused_by(chosen_schedule, preset, steps, threshold_noise, linear_steps, denoise)
            or True
        )

    @classmethod
    def execute(
        cls, preset: str, steps: int, threshold_noise: float, linear_steps: int, denoise: float
    ) -> io.NodeOutput:
        numbers = {"steps": steps, "threshold_noise": threshold_noise, "linear_steps": linear_steps, "denoise": denoise}
        _checks.at_run(cls, preset=preset, **numbers)
        return io.NodeOutput(_host.sigmas_tensor(chosen_schedule(preset, **numbers)))
