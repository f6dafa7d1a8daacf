"""How much of the time of copies to a device its kernels ran beside them, from what torch's profiler saw."""

import bisect
import itertools
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu.session import Facts

Interval = tuple[float, float]


def events_of(run: harness.Run, device: torch.device) -> list[dict[str, Any]]:
    """What the device did during one run, as the profiler writes it for Chrome."""
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def overlap(events: Iterable[Mapping[str, Any]]) -> Facts:
    """How much of the copies' time to the device kernels of other streams ran beside them.

    `events` are a Chrome trace's, in microseconds. `idle_share` is the part of the time from the first of them to the
    last in which no kernel ran.
    """
    listed = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy")]
    copies = [event for event in listed if event["cat"] == "gpu_memcpy" and "HtoD" in event["name"]]
    kernels = [event for event in listed if event["cat"] == "kernel"]
    if not copies or not kernels:
        return {"copies": len(copies), "kernels": len(kernels), "overlap_share": None}
    beside = {
        stream: union(interval(event) for event in kernels if event["args"]["stream"] != stream)
        for stream in {copy["args"]["stream"] for copy in copies}
    }
    hidden = sum(shared(interval(copy), beside[copy["args"]["stream"]]) for copy in copies)
    copied = sum(copy["dur"] for copy in copies)
    busy = sum(end - start for start, end in union(map(interval, kernels)))
    whole = union([(min(interval(e)[0] for e in listed), max(interval(e)[1] for e in listed))])[0]
    return {
        "copies": len(copies),
        "kernels": len(kernels),
        "overlap_share": hidden / copied,
        "copies_s": copied / 1e6,
        "kernels_s": busy / 1e6,
        "idle_share": 1 - busy / (whole[1] - whole[0]),
        "bytes_copied": sum(copy["args"].get("bytes", 0) for copy in copies),
    }


def interval(event: Mapping[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times, each once, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def shared(one: Interval, others: Sequence[Interval]) -> float:
    """How much of `one` lies in `others`, which are in order and apart."""
    first = bisect.bisect_left(others, one[0], key=lambda other: other[1])
    within = itertools.takewhile(lambda other: other[0] < one[1], itertools.islice(others, first, None))
    return sum(min(end, one[1]) - max(start, one[0]) for start, end in within)
