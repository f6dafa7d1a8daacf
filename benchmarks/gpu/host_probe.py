"""A ComfyUI extension that `host_memory.py` copies into the host it starts: what the process took since last asked."""

from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, Any] = {}


@PromptServer.instance.routes.get("/mochi_benchmark/peaks")
async def peaks(request: web.Request) -> web.Response:
    """The peaks since the last call. What is not torch's on the device, `/system_stats` sees."""
    found: dict[str, int | None] = {"peak_rss_bytes": _peak_rss(), "peak_allocated_bytes": None}
    if torch.cuda.is_available():
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
    return web.json_response(found)


def _peak_rss() -> int | None:
    """Linux only; sets the mark back."""
    status, marks = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    marks.write_text("5")
    return int(line.split()[1]) * 1024
