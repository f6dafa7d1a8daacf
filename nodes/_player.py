"""The MP4 that the decode node's player shows, in the host's temporary folder."""

import logging
import uuid
from pathlib import Path
from typing import Any

import torch

from mochi_core.errors import MochiError
from mochi_core.video_file import write_mp4

log = logging.getLogger("mochi_video")

FOLDER = "mochi_video"
# Half a minute of frames at a time: what is held twice while it is written.
FRAMES_AT_ONCE = 30


def written(frames: torch.Tensor, fps: float, folder: Path, metadata: dict[str, str]) -> dict[str, Any] | None:
    """Writes `T H W 3`, 0 to 1, and returns what the page needs to play it.

    Failing is a warning: the frames themselves go on.
    """
    name = f"mochi_video_{uuid.uuid4().hex[:12]}.mp4"
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        write_mp4(folder / FOLDER / name, frames.split(FRAMES_AT_ONCE), fps, preset="veryfast", metadata=metadata)
    except (OSError, MochiError) as error:
        log.warning("The player has no video: %s", error)
        return None
    height, width = frames.shape[1:3]
    file = {"filename": name, "subfolder": FOLDER, "type": "temp"}
    return {**file, "frames": len(frames), "fps": fps, "width": width, "height": height}
