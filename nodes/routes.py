"""What the page may ask the host about our nodes."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from aiohttp import web

from mochi_core.errors import MochiError, ShapeError
from mochi_core.memory.plan import Networks
from mochi_core.shapes import VideoSize
from mochi_core.weights.build import TINY_DIT, TINY_NAME

from . import _checks, _host, native_files
from ._cost import cost, networks_of
from .loading import DIT_FOLDERS
from .native_dit import MEMORY
from .size import MochiVideoSize

COST = "/mochi_video/cost"
# Several lines of a page ask at once; one of them makes the networks.
_ASKING = threading.Lock()


def add_routes(routes: Any) -> None:
    """Adds ours to the host's route table, unless another copy of this pack has: the host refuses to start with two."""
    if not any(getattr(route, "path", None) == COST for route in routes):
        routes.get(COST)(cost_of_request)


async def cost_of_request(request: web.Request) -> web.Response:
    """What a size costs: `width`, `height`, `frames`, and if wanted `batch_size`, `dit_name`, `memory`.

    Answers with a `Cost` as JSON, or 400 and what is wrong with the question.
    """
    try:
        # In a thread: the first question about a file reads its header and builds its network.
        answer = await asyncio.get_running_loop().run_in_executor(None, answered, request.query)
    except (MochiError, _checks.InputError) as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response(answer)


def answered(query: Mapping[str, str]) -> dict[str, Any]:
    """Raises `MochiError` kinds or `InputError` on a question that cannot be answered."""
    size = VideoSize(*(_whole(query, name) for name in ("width", "height", "frames")))
    batch = _whole(query, "batch_size", 1)
    memory = query.get("memory", MEMORY[0])
    wrong = _checks.out_of_range(MochiVideoSize, batch_size=batch) or _checks.not_among(memory=(memory, MEMORY))
    if wrong:
        raise _checks.InputError(wrong)
    path, stamp = _file(query.get("dit_name", ""))
    with _ASKING:
        networks = _networks(path, stamp)
    device = _host.sampling_device()
    found = cost(networks, size, device, _host.usable_memory(device), batch=batch, memory=memory)
    return {**asdict(found), "dit_known": path is not None}


def _whole(query: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = query.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ShapeError(f"{name} is {text!r}", "it must be a whole number", "Send it in the query")
    return int(text)


def _file(name: str) -> tuple[str | None, str]:
    """Where the DiT called `name` lies, and a stamp that changes with it; None when there is no such file here."""
    if name == TINY_NAME:
        return str(TINY_DIT), ""
    if name in native_files.file_names(DIT_FOLDERS):
        return native_files.model_path(name, DIT_FOLDERS), native_files.stamp([name], DIT_FOLDERS)
    return None, ""


@lru_cache(maxsize=4)
def _networks(path: str | None, stamp: str) -> Networks:
    return networks_of(path)
