"""Loading a DiT: seconds and peak memory from a file to a network whose every tensor has been read.

    python benchmarks/load_weights.py [--megabytes 600] [--dtype bfloat16] [--rounds 3]

A random file in the released names is written to a temporary folder (so it lies in the page cache), then each round
loads it in a fresh process with `load_dit` and sums every tensor. Resident memory should grow by no more than 1.05
times the file: tensors are views of the mapped file.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from mochi_core.config import DiTConfig
from mochi_core.dit import AsymmDiT

GOAL = 1.05
ONE_BLOCK = DiTConfig(depth=1, heads=6, visual_dim=768, text_dim=384, text_feature_dim=1024)


def config_of(megabytes: int, dtype: torch.dtype) -> DiTConfig:
    """As many medium blocks as make a file of about this size."""

    def values(depth: int) -> int:
        return sum(p.numel() for p in AsymmDiT(replace(ONE_BLOCK, depth=depth), device="meta").parameters())

    block = values(3) - values(2)
    wanted = megabytes * 1e6 / dtype.itemsize
    return replace(ONE_BLOCK, depth=max(1, round((wanted - values(1)) / block) + 1))


def write_file(path: Path, config: DiTConfig, dtype: torch.dtype) -> None:
    """Random weights in the released names, the architecture in the metadata in the reference's names."""
    model = AsymmDiT(config, dtype=dtype, device="meta").to_empty(device="cpu")
    harness.randomize(model)
    metadata = {theirs: getattr(config, ours) for theirs, ours in DiTConfig.METADATA_NAMES.items()}
    metadata |= {name: getattr(config, name) for name in ("depth", "patch_size", "timestep_scale")}
    save_file(model.state_dict(), path, metadata={"config": json.dumps(metadata)})


def load_and_touch(path: Path, threads: int) -> dict[str, float]:
    """Seconds to load and to read every tensor, and how far the process grew at its peak."""
    from mochi_core.weights.build import load_dit  # here: slow to import, and not part of what is measured

    torch.set_num_threads(threads)
    with harness.RssGrowth() as growth:
        start = time.perf_counter()
        model, _ = load_dit(path)
        loaded = time.perf_counter()
        for tensor in model.state_dict().values():
            tensor.sum()
        touched = time.perf_counter()
    return {"load_s": loaded - start, "touch_s": touched - loaded, "peak_rss_growth_bytes": growth.bytes}


def in_fresh_process(path: Path, threads: int) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(load_and_touch, path, threads).result()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--dtype", choices=harness.DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "load_weights.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    dtype = harness.DTYPES[options.dtype]
    config = config_of(options.megabytes, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dit.safetensors"
        write_file(path, config, dtype)
        file_bytes = path.stat().st_size
        rounds: list[dict[str, Any]] = [in_fresh_process(path, options.threads) for _ in range(options.rounds)]
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    ratio = medians["peak_rss_growth_bytes"] / file_bytes
    print(f"file {file_bytes / 1e6:.0f} MB, depth {config.depth}, {options.dtype}")
    print(f"  load {medians['load_s']:.3f} s, then read every tensor {medians['touch_s']:.3f} s")
    print(f"  peak RSS growth / file {ratio:.3f} (goal: at most {GOAL})")
    harness.write_json(
        options.output,
        {
            "benchmark": "load_weights",
            "environment": harness.environment(),
            "settings": {"megabytes": options.megabytes, "dtype": options.dtype, "depth": config.depth},
            "file_bytes": file_bytes,
            "rounds": rounds,
            **medians,
            "peak_over_file": ratio,
            "goal": GOAL,
        },
    )
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    main()
