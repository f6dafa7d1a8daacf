"""How large and how long the video is."""

import math

import torch
from comfy_api.latest import io

from mochi_core.config import MOCHI_1
from mochi_core.dit.flops import visual_tokens
from mochi_core.errors import ShapeError
from mochi_core.shapes import RELEASED_FPS, VideoSize, frames_for_seconds

from . import _checks, _host

PRESETS = {
    "custom": None,
    "848x480 (released)": (848, 480),
    "480x848 portrait": (480, 848),
    "640x640 square": (640, 640),
    "640x368 fast": (640, 368),
    "64x64 tiny": (64, 64),
}
LARGEST = 4096
LONGEST = 6 * 256 + 1


def chosen_size(preset: str, width: int, height: int, frames: int, seconds: float) -> VideoSize:
    """The size that the widgets mean. Raises `ShapeError` when the model cannot make it."""
    width, height = PRESETS[preset] or (width, height)
    if not 0 <= seconds < math.inf:
        raise ShapeError(f"seconds is {seconds}", "it must be a length: 0 or more", "Use 0 to go by frames")
    return VideoSize(width, height, frames_for_seconds(seconds) if seconds else frames)


class MochiVideoSize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoSize",
            display_name="Mochi Video Size",
            category="Mochi Video/latent",
            description="Empty latents of the video's size. Width and height are multiples of 16, frames are 6k+1.",
            search_aliases=["empty latent", "resolution", "empty mochi latent video", "duration"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="848x480 (released)",
                    tooltip="A picture size, or custom for the width and height below.",
                ),
                io.Int.Input("width", default=848, min=16, max=LARGEST, step=16, tooltip="Pixels, a multiple of 16."),
                io.Int.Input("height", default=480, min=16, max=LARGEST, step=16, tooltip="Pixels, a multiple of 16."),
                io.Int.Input(
                    "frames",
                    default=163,
                    min=1,
                    max=LONGEST,
                    step=6,
                    tooltip="1, 7, 13, ... 163: the first frame, then six for each latent frame.",
                ),
                _host.advanced(
                    io.Float.Input(
                        "seconds",
                        default=0.0,
                        min=0.0,
                        max=LONGEST / RELEASED_FPS,
                        step=0.1,
                        tooltip=f"Instead of frames: the length at {RELEASED_FPS} frames a second, to the nearest "
                        "possible. 0: go by frames.",
                    )
                ),
                _host.advanced(
                    io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many videos to make at once.")
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="Empty latents for a sampler."),
                io.Int.Output(display_name="frames", tooltip="How many frames the video will have."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        preset: str | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        seconds: float | None = None,
        batch_size: int | None = None,
    ) -> bool | str:
        return (
            _checks.not_among(preset=(preset, PRESETS))
            or _checks.refused_by(chosen_size, preset, width, height, frames, seconds)
            or _checks.out_of_range(
                cls, width=width, height=height, frames=frames, seconds=seconds, batch_size=batch_size
            )
            or True
        )

    @classmethod
    def execute(
        cls, preset: str, width: int, height: int, frames: int, seconds: float, batch_size: int
    ) -> io.NodeOutput:
        given = {"width": width, "height": height, "frames": frames, "seconds": seconds, "batch_size": batch_size}
        _checks.at_run(cls, preset=preset, **given)
        size = chosen_size(preset, width, height, frames, seconds)
        latent = size.latent
        _host.log.info(
            "%dx%d, %d frames: %.1f s at %d frames a second, %d visual tokens",
            size.width,
            size.height,
            size.frames,
            size.frames / RELEASED_FPS,
            RELEASED_FPS,
            visual_tokens(MOCHI_1.dit, latent),
        )
        shape = (batch_size, MOCHI_1.dit.latent_channels, latent.frames, latent.height, latent.width)
        return io.NodeOutput({"samples": torch.zeros(shape, device=_host.intermediate_device())}, size.frames)
