"""The MP4 that the decode node's player shows, in the host's temporary folder."""

import logging
import time
import uuid
from pathlib import Path
from typing import Any

import torch

from mochi_core.video_file import write_mp4

log = logging.getLogger("mochi_video")

FOLDER = "mochi_video"
# What is held twice while it is written.
FRAMES_AT_ONCE = 30
# A host that runs for weeks decodes thousands of clips; what is older than these is no longer looked at.
KEPT, OLD_SECONDS = 64, 3600


def written(frames: torch.Tensor, fps: float, folder: Path, metadata: dict[str, str]) -> dict[str, Any] | None:
    """Writes `T H W 3`, 0 to 1, and returns what the page needs to play it.

    Failing is a warning: the frames themselves go on.
    """
    name = f"mochi_video_{uuid.uuid4().hex[:12]}.mp4"
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        write_mp4(folder / FOLDER / name, frames.split(FRAMES_AT_ONCE), fps, preset="veryfast", metadata=metadata)
        _delete_old(folder / FOLDER)
    except Exception as error:  # whatever it is, the frames go on
        log.warning("The player has no video: %s", error)
        return None
    height, width = frames.shape[1:3]
    file = {"filename": name, "subfolder": FOLDER, "type": "temp"}
    return {**file, "frames": len(frames), "fps": fps, "width": width, "height": height}


def _delete_old(folder: Path) -> None:
    """All but the newest; what is newer than an hour may be of a list that is still being made."""
    files = sorted(folder.glob("*.mp4"), key=lambda file: file.stat().st_mtime)
    for file in files[:-KEPT]:
        try:
            if time.time() - file.stat().st_mtime > OLD_SECONDS:
                file.unlink(missing_ok=True)
        except OSError:  # some systems delete no file that a page is reading
            continue
