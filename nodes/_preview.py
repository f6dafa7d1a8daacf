"""A moving preview: the pictures of a clip in one JPEG, row by row, for the page to play."""

import base64
import io
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from mochi_core.preview import LatentColours
from mochi_core.shapes import FRAMES_PER_LATENT, RELEASED_FPS

log = logging.getLogger("mochi_video")

# Pages get a preview no more often, and none larger: of the released size, noise makes 340,000 characters.
SECONDS_BETWEEN = 0.5
MOST_PICTURES = 64
LONGEST_SIDE = 160
QUALITY = 80


@dataclass(frozen=True)
class Strip:
    """`count` pictures of `width` x `height`, `columns` in a row; `fps` plays them as fast as the video will run."""

    image: str
    count: int
    columns: int
    width: int
    height: int
    fps: float


def strip(pictures: torch.Tensor) -> Strip:
    """`T H W 3` uint8, one for each latent frame."""
    taken = pictures[:: math.ceil(len(pictures) / MOST_PICTURES)]
    height, width = taken.shape[1:3]
    scale = min(1, LONGEST_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    columns = math.ceil(math.sqrt(len(taken)))
    sheet = Image.new("RGB", (columns * size[0], math.ceil(len(taken) / columns) * size[1]))
    for index, picture in enumerate(taken.numpy()):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(picture).resize(size), (column * size[0], row * size[1]))
    content = io.BytesIO()
    # All of its colours: a picture may have no more than 8 pixels a side.
    sheet.save(content, "JPEG", quality=QUALITY, subsampling=0)
    fps = RELEASED_FPS / FRAMES_PER_LATENT * len(taken) / len(pictures)
    image = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    return Strip(image, len(taken), columns, *size, fps)


def with_previews(
    callback: Callable[..., None] | None,
    colours: LatentColours | None,
    send: Callable[[dict[str, Any]], None],
    wanted: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
) -> Callable[..., None]:
    """The host's callback after each step, followed by a preview of the first clip.

    `send` gets the strip with the `step` and how many `steps` there are: at most one each `SECONDS_BETWEEN`, and the
    last. There are none while they are not `wanted`, or without colours. A preview that fails is a warning.
    """
    sent = -math.inf

    def after_step(step: int, denoised: torch.Tensor, latents: torch.Tensor, steps: int, *rest: Any) -> None:
        nonlocal sent, colours
        if callback is not None:
            callback(step, denoised, latents, steps, *rest)
        due = clock() - sent >= SECONDS_BETWEEN or step + 1 == steps
        if colours is None or denoised is None or denoised.ndim != 5 or not due or not wanted():
            return
        try:
            send({"step": step + 1, "steps": steps, **asdict(strip(colours.pictures(denoised[0])))})
        except Exception as error:  # whatever it is, the sampling goes on
            colours = None
            log.warning("There are no more previews of this run: %s", error)
        sent = clock()

    return after_step
