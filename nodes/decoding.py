"""Latents to frames, and frames to latents."""

from fractions import Fraction

import torch
from comfy_api.latest import InputImpl, Types, io

from mochi_core.errors import ShapeError, WeightsError
from mochi_core.latents import require_finite
from mochi_core.shapes import PIXELS_PER_PATCH, RELEASED_FPS, whole_frames

from . import _checks, _host
from ._player import written
from ._tiles import MODES, check_tiles
from .native_vae import MochiVAE

CATEGORY = "Mochi Video/latent"
# Under this name the page finds the files in what the node reports.
PLAYER = "mochi_video"
TILES = "tiled spatial: 1, 2, 4, 8 or 16. tiled blended: any."


def _ours(vae: object) -> MochiVAE:
    if not isinstance(vae, MochiVAE):
        raise WeightsError(
            f"The VAE is a {type(vae).__name__} of another loader",
            "exact streaming and the posterior need this pack's VAE",
            "Load the file with Mochi Video VAE Loader, or use the host's own VAE nodes",
        )
    return vae


class MochiVideoDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoDecode",
            display_name="Mochi Video Decode",
            category=CATEGORY,
            description="Turns latents into frames and a video, and plays it.",
            search_aliases=["vae decode", "mochi decode", "latent to video", "video player"],
            inputs=[
                io.Vae.Input("vae", tooltip="From Mochi Video VAE Loader."),
                io.Latent.Input("latent", tooltip="From a sampler."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="streaming: exact, memory does not grow with length. full: exact, all at once if it fits. "
                    "tiled spatial: blended tiles as in the reference, for matching older videos. "
                    "tiled blended: any number of tiles, as other nodes blend them.",
                ),
                io.Float.Input(
                    "fps", default=float(RELEASED_FPS), min=1.0, max=240.0, step=1.0, tooltip="Mochi makes 30 a second."
                ),
                _host.advanced(io.Int.Input("tile_rows", default=2, min=1, max=16, tooltip=TILES)),
                _host.advanced(io.Int.Input("tile_columns", default=4, min=1, max=16, tooltip=TILES)),
                _host.advanced(
                    io.Int.Input(
                        "tile_overlap",
                        default=0,
                        min=0,
                        max=64,
                        step=2,
                        tooltip="Latent pixels that tiles share; even for tiled spatial.",
                    )
                ),
                _host.advanced(
                    io.Boolean.Input(
                        "player",
                        default=True,
                        optional=True,
                        tooltip="Play the video on this node. Off: no temporary file is written for it.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE",
                    is_output_list=True,
                    tooltip="Every frame; of a batch, clip after clip.",
                ),
                io.Video.Output(
                    display_name="VIDEO",
                    is_output_list=True,
                    tooltip="For Save Video; of a batch, each clip.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            # Newer hosts tell the page of the player's file again when nothing had to run.
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        mode: str | None = None,
        fps: float | None = None,
        tile_rows: int | None = None,
        tile_columns: int | None = None,
        tile_overlap: int | None = None,
    ) -> bool | str:
        tiles = {"tile_rows": tile_rows, "tile_columns": tile_columns, "tile_overlap": tile_overlap}
        return (
            _checks.not_among(mode=(mode, MODES))
            or _checks.out_of_range(cls, fps=fps, **tiles)
            or _checks.refused_by(check_tiles, mode, *tiles.values())
            or True
        )

    @classmethod
    def execute(
        cls,
        vae: io.Vae.Type,
        latent: io.Latent.Type,
        mode: str,
        fps: float,
        tile_rows: int,
        tile_columns: int,
        tile_overlap: int,
        player: bool = True,
    ) -> io.NodeOutput:
        tiles = {"tile_rows": tile_rows, "tile_columns": tile_columns, "tile_overlap": tile_overlap}
        _checks.at_run(cls, mode=mode, fps=fps, **tiles)
        samples = latent["samples"]
        require_finite(samples, "The latents to decode")
        options = {"mode": mode, "rows": tile_rows, "columns": tile_columns, "overlap": tile_overlap}
        clips = list(_ours(vae).decode(samples, vae_options=options))
        rate = Fraction(fps).limit_denominator(1001)
        videos = [InputImpl.VideoFromComponents(Types.VideoComponents(images=clip, frame_rate=rate)) for clip in clips]
        return io.NodeOutput(clips, videos, ui=cls._player(clips, fps) if player else None)

    @classmethod
    def _player(cls, clips: list[torch.Tensor], fps: float) -> dict[str, list[dict]]:
        """The clips as files that the page can play; they carry the graph, as saved ones do."""
        metadata = _host.graph_metadata(cls.hidden)
        files = [written(clip, fps, _host.temporary_folder(), metadata) for clip in clips]
        return {PLAYER: [file for file in files if file is not None]}


class MochiVideoEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoEncode",
            display_name="Mochi Video Encode",
            category=CATEGORY,
            description="Turns frames into latents. They are cropped to the grid: multiples of 16 pixels, 6k+1 frames.",
            search_aliases=["vae encode", "mochi encode", "video to latent", "video to video"],
            inputs=[
                io.Vae.Input("vae", tooltip="From Mochi Video VAE Loader, with an encoder."),
                io.Image.Input("image", optional=True, tooltip="Frames to encode: these or a video."),
                io.Video.Input("video", optional=True, tooltip="A video to encode: this or frames."),
                _host.advanced(
                    io.Boolean.Input(
                        "sample_posterior",
                        default=False,
                        tooltip="Draw the latents from the encoder's distribution instead of taking its mean.",
                    )
                ),
                _host.advanced(
                    io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Seed of that draw.")
                ),
            ],
            outputs=[io.Latent.Output(tooltip="Latents in VAE space.")],
        )

    @classmethod
    def execute(
        cls,
        vae: io.Vae.Type,
        image: torch.Tensor | None = None,
        video: io.Video.Type | None = None,
        sample_posterior: bool = False,
        seed: int = 0,
    ) -> io.NodeOutput:
        frames = image if video is None else video.get_components().images
        if frames is None or (image is not None and video is not None):
            raise ShapeError(
                "Neither image nor video is connected" if image is None else "Both image and video are connected",
                "there must be one of them",
                "Connect one",
            )
        frames = cropped(frames)
        require_finite(frames, "The frames to encode")
        return io.NodeOutput({"samples": _ours(vae).encode_frames(frames, seed if sample_posterior else None)})


def cropped(frames: torch.Tensor) -> torch.Tensor:
    """`T H W C` cut to the grid, the picture around its middle, the clip at its end; says so when anything goes."""
    count, height, width = frames.shape[:3]
    if min(height, width) < PIXELS_PER_PATCH or not count:
        raise ShapeError(
            f"The frames are {width}x{height}, {count} of them",
            f"there must be at least one, of {PIXELS_PER_PATCH} x {PIXELS_PER_PATCH} pixels or more",
            "Scale them up",
        )
    keep = whole_frames(count)
    rows, columns = (size // PIXELS_PER_PATCH * PIXELS_PER_PATCH for size in (height, width))
    if (keep, rows, columns) != (count, height, width):
        _host.log.warning(
            "encoding %dx%d, %d frames of %dx%d, %d frames: the grid is 16 pixels and 6k+1 frames",
            columns, rows, keep, width, height, count,
        )  # fmt: skip
    top, left = (height - rows) // 2, (width - columns) // 2
    return frames[:keep, top : top + rows, left : left + columns, :3]
