"""What the page is told while a node runs, beside the host's own progress: a moving preview, a training, warnings.

Messages go over the host's socket to the page that queued the prompt. All in them is data: pages show it as text.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

import comfy_execution.utils

from . import _host
from ._preview import with_previews

PREVIEW, WARNING, TRAINING = "mochi_video.preview", "mochi_video.warning", "mochi_video.training"
LOGGERS = ("mochi_video", "mochi_core")
# How much of a warning pages get; the log has all of it.
LONGEST_TEXT = 600


def server() -> Any:
    """The host's server, or None where there is none: in a test, or in a script that only uses the host's code."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def send(event: str, data: dict[str, Any]) -> None:
    """`data` with the running node and prompt, to whoever queued it. Nothing when no node runs, or nobody asked."""
    found, running = server(), comfy_execution.utils.get_executing_context()
    if found is None or running is None or found.client_id is None:
        return
    found.send_sync(event, {"node": running.node_id, "prompt_id": running.prompt_id, **data}, found.client_id)


def listened_to() -> bool:
    """Whether whoever queued the running prompt is there to be told of it."""
    found = server()
    return found is not None and found.client_id is not None and found.client_id in found.sockets


def previewed(callback: Callable[..., None] | None, latent_format: Any) -> Callable[..., None]:
    """A sampler's callback that also sends moving previews."""
    colours = getattr(latent_format, "colours", None)
    return with_previews(callback, colours, lambda data: send(PREVIEW, data), listened_to)


def send_training(data: dict[str, Any]) -> None:
    """Tells the page of a training. What it is told of never ends by the telling."""
    try:
        send(TRAINING, data)
    except Exception:
        logging.getLogger("mochi_video").warning("The page could not be told of the training", exc_info=True)


class _ToPage(logging.Handler):
    """Hands a warning of ours on to the page."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            send(WARNING, {"text": record.getMessage()[:LONGEST_TEXT]})
        except Exception:
            self.handleError(record)


def send_warnings() -> None:
    """From now on the page sees our warnings; the log does as before."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(type(handler).__name__ == _ToPage.__name__ for handler in logger.handlers):
            logger.addHandler(_ToPage(logging.WARNING))


def bar_moved() -> Callable[..., None]:
    """A sampler's callback that moves the node's bar and nothing else: the preview is ours."""
    report = _host.progress()
    return lambda step, denoised, latents, total: report(step + 1, total)
