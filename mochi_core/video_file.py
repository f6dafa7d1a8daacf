"""Frames into a video file, written as they come.

Shapes: `T H W` = frames, rows, columns.
"""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import torch

from .errors import MochiError
from .shapes import RELEASED_FPS

# x264's quality; lower is better. ComfyUI's own Save Video leaves it at the default, 23.
QUALITY = 17


def write_mp4(
    path: str | Path,
    pieces: Iterable[torch.Tensor],
    fps: float = RELEASED_FPS,
    *,
    preset: str = "medium",
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes pieces of a video, each `T H W 3` from 0 to 1, as H.264; returns the number of frames.

    `preset` is x264's: faster ones make larger files. `metadata` is kept in the file, which appears when it is whole.
    Raises `MochiError` when there is no frame, and `OSError` as writing does.
    """
    import av  # only this needs it

    path = Path(path)
    unfinished = path.with_name(f".{path.name}.part")
    count = 0
    try:
        # By itself the format keeps only a few names of metadata; and a file that starts with its index plays at once.
        options = {"movflags": "use_metadata_tags+faststart"}
        with av.open(str(unfinished), "w", format="mp4", options=options) as file:
            file.metadata.update(metadata or {})
            stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": str(QUALITY), "preset": preset}
            for piece in pieces:
                for picture in piece.mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy():
                    if not count:
                        stream.height, stream.width = picture.shape[:2]
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                    count += 1
            file.mux(stream.encode())
        if not count:
            raise MochiError("The video has no frame", "there must be one", "Decode something")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count
