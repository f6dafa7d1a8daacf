"""What every benchmark shares: the record of the machine, fair timing, peak memory, random weights, tables and JSON.

Contenders are timed in one process, in turns: a warm-up round, then rounds whose order rotates, so that a machine
that slows down slows all of them. Ratios are medians of the ratios within a round. Memory is measured in a fresh
process for each contender.
"""

import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Run = Callable[[], Any]


# Options


def size(text: str) -> tuple[int, int, int]:
    """`TxHxW` from the command line."""
    frames, rows, columns = (int(number) for number in text.split("x"))
    return frames, rows, columns


# The machine


def environment() -> dict[str, Any]:
    """Where and when a result was made, and from which code."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*command: str) -> str | None:
    """What git says, None where there is no repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# Time


def time_in_turns(contenders: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after a warm-up round; the order rotates from round to round."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in contenders.values():
        run()
    for first in range(rounds):
        for position in range(len(names)):
            name = names[(first + position) % len(names)]
            times[name].append(seconds(contenders[name]))
    return times


def seconds(run: Run) -> float:
    """The seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """The median over the rounds of this time over the reference's."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def summary(times: Mapping[str, list[float]], memory: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Each contender's median, its ratios to `ours` and to `floor`, its peak memory (bytes; none for the floor)."""
    return {
        name: {
            "median_s": statistics.median(series),
            "min_s": min(series),
            "ratio_to_ours": paired_ratio(series, times["ours"]),
            "ratio_to_floor": paired_ratio(series, times["floor"]),
            "peak_rss_growth_bytes": memory.get(name),
            "times_s": series,
        }
        for name, series in times.items()
    }


# Memory


def peak_rss_growth(make: Callable[..., Run], *inputs: Any) -> int:
    """How many bytes the process grows at its peak while running what `make(*inputs)` returns, in a fresh process.

    `make` must be importable (a module's function); what it loads lies below the baseline.
    """
    return in_fresh_process(_growth, make, *inputs)


def in_fresh_process(function: Callable[..., Any], *inputs: Any) -> Any:
    """What an importable function returns in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *inputs).result()


def _growth(make: Callable[..., Run], *inputs: Any) -> int:
    run = make(*inputs)
    with RssGrowth() as growth:
        run()
    return growth.bytes


class RssGrowth:
    """`with RssGrowth() as growth: ...`, then `growth.bytes`: peak resident memory over that at the start.

    Linux only: freed memory is given back first, and the process's high-water mark is set back.
    """

    def __enter__(self) -> "RssGrowth":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._baseline = _peak_rss()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bytes = _peak_rss() - self._baseline


def _peak_rss() -> int:
    # Not getrusage: what that says starts from the size of the process that spawned this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# Weights and outputs


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Random weights under which activations keep their size: matrices scaled by their inputs, gains about one."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.1, generator=generator)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    module.requires_grad_(False).eval()


def difference(output: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """How far an output is from the reference: the largest difference, and the RMS difference over the RMS."""
    error = output.double() - reference.double()
    relative = error.square().mean().sqrt() / reference.double().square().mean().sqrt()
    return {"max_abs": error.abs().max().item(), "relative_rms": relative.item()}


# Reports


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The summary of one set of contenders."""
    print(f"\n{title}")
    print(f"  {'':<14}{'median s':>10}{'/ ours':>9}{'/ floor':>9}{'peak RSS MB':>13}")
    for name, row in rows.items():
        memory = row["peak_rss_growth_bytes"]
        peak = "" if memory is None else f"{memory / 1e6:.0f}"
        print(
            f"  {name:<14}{row['median_s']:>10.4f}{row['ratio_to_ours']:>9.3f}{row['ratio_to_floor']:>9.3f}{peak:>13}"
        )


def print_differences(differences: Mapping[str, Mapping[str, float]]) -> None:
    """How far each contender's output is from ours."""
    for name, values in differences.items():
        print(f"  {name} - ours: max {values['max_abs']:.2e}, relative RMS {values['relative_rms']:.2e}")


def print_skipped(skipped: Mapping[str, str]) -> None:
    """Which contenders are absent, and why."""
    for name, reason in skipped.items():
        print(f"  {name} left out: {reason}")


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result where `path` says, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
