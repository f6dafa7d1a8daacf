"""One run on a device: what it measures, against which deadline, and what it has recorded so far.

What does not run is recorded with its reason, and the JSON is rewritten after each measurement.
"""

import argparse
import dataclasses
import datetime
import gc
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import harness, peers
from mochi_core.config import ModelConfig
from mochi_core.errors import MochiError

DTYPE = torch.bfloat16

Facts = dict[str, Any]


@dataclass
class Session:
    """One run: its options, its deadline, and its records."""

    options: argparse.Namespace
    config: ModelConfig
    output: Path
    deadline: float
    environment: Facts
    peak_flops: float | None = None
    records: list[Facts] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def measure(self, facts: Facts, make: Callable[..., harness.Run], *inputs: Any, flops: int | None = None) -> None:
        """Times what `make(*inputs)` returns and records that with `facts`; or why it cannot run."""
        if self.over:
            self.record({**facts, "skipped": "time limit"})
            return
        measured: Facts
        try:
            measured = timed(make(*inputs), self.options.repeats, self.device)
        except torch.OutOfMemoryError:
            measured = {"error": "out of memory"}
        except (RuntimeError, NotImplementedError, ImportError, MochiError) as error:
            measured = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        seconds = measured.get("seconds")
        if flops and seconds:
            measured |= {"flops": flops, "flops_per_s": flops / seconds}
            if self.peak_flops:
                measured["of_matrix_peak"] = flops / seconds / self.peak_flops
        self.record({**facts, **measured})
        free(self.device)

    def built(self, facts: Facts, build: Callable[..., Any], *inputs: Any) -> Any | None:
        """What `build(*inputs)` makes; None, and a record that says why, when it cannot be made."""
        try:
            return build(*inputs)
        except torch.OutOfMemoryError:
            self.record({**facts, "error": "out of memory"})
        except peers.PeerUnavailable as reason:
            self.record({**facts, "error": str(reason)})
        free(self.device)
        return None

    def record(self, facts: Facts) -> None:
        """Adds one measurement, prints it and saves all."""
        self.records.append(facts)
        print("  ".join(f"{name}={_short(value)}" for name, value in facts.items() if name != "times_s"), flush=True)
        self.save()

    def save(self) -> None:
        harness.write_json(
            self.output,
            {
                "benchmark": "gpu_full_size",
                "environment": self.environment,
                "peers": peers.versions(),
                "settings": {name: value for name, value in vars(self.options).items() if name != "output"},
                "config": dataclasses.asdict(self.config),
                "matrix_peak_flops_per_s": self.peak_flops,
                "records": self.records,
            },
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def hardware(device: torch.device) -> Facts:
    """The device and its software, for the record."""
    if device.type == "cpu":
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "device": properties.name,
        "device_memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def default_output(device: torch.device, benchmark: str = "") -> Path:
    """Where the result of a benchmark on this device goes unless told otherwise."""
    name = re.sub(r"[^a-z0-9]+", "-", hardware(device)["device"].lower()).strip("-")
    parts = ["gpu", *([benchmark] if benchmark else []), name, datetime.date.today().isoformat()]
    return harness.RESULTS / f"{'-'.join(parts)}.json"


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(run: harness.Run, repeats: int, device: torch.device) -> Facts:
    """Seconds of each repeat after a warm-up, and the device's peak memory, with what was resident before."""
    cuda = device.type == "cuda"
    resident = torch.cuda.memory_allocated(device) if cuda else None
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def synchronized() -> None:
        run()
        if cuda:
            torch.cuda.synchronize(device)

    synchronized()
    times = [harness.seconds(synchronized) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    return {
        "seconds": statistics.median(times),
        "peak_bytes": peak,
        "resident_bytes": resident,
        "times_s": times,
    }


def on_device(model: nn.Module, device: torch.device) -> Any:
    """A model from the meta device, in bf16 with random weights."""
    model = model.to(DTYPE).to_empty(device=device)
    harness.randomize(model)
    return model
