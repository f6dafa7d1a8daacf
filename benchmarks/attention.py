"""The attention kernels against each other, at the DiT's shapes: one prompt, and a ragged batch of two.

    python benchmarks/attention.py [--device cuda] [--visual-tokens 7950 44520] [--kernels sdpa flash] [--rounds 15] ...

Each kernel's error against the float32 reference is measured on a small ragged batch first. `sdpa` takes a ragged batch
one sample at a time; what torch's function with a mask would take is timed beside it. Operations are counted over valid
tokens, so that what a kernel computes of the padding counts against it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.gpu.session import free, hardware
from mochi_core.attention import flash, nvidia, sdpa
from mochi_core.attention.kernels import KERNELS, get_kernel
from mochi_core.attention.reference import attend as reference
from mochi_core.errors import KernelError

Attend = Callable[..., torch.Tensor]

LARGEST_SCORES = {"cpu": 1 << 30, "cuda": 8 << 30}  # bytes, in float32


@dataclass(frozen=True)
class Defaults:
    heads: int
    visual_tokens: tuple[int, ...]
    dtypes: tuple[str, ...]


# On a GPU the released model: 25, 85 and 163 frames of 848x480.
DEFAULTS = {
    "cpu": Defaults(6, (256, 1024, 2048), ("float32", "bfloat16")),
    "cuda": Defaults(24, (7950, 23850, 44520), ("bfloat16",)),
}


@dataclass(frozen=True)
class Case:
    """What is run: one prompt for each entry of `text_tokens`, padded to the longest."""

    heads: int
    head_dim: int
    visual_tokens: int
    text_tokens: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        return f"{self.visual_tokens} + {' / '.join(map(str, self.text_tokens))}"

    @property
    def lengths(self) -> list[int]:
        return [self.visual_tokens + text for text in self.text_tokens]

    @property
    def flops(self) -> int:
        """Scores and weighted values, two operations a multiply-add."""
        return sum(4 * length**2 * self.heads * self.head_dim for length in self.lengths)

    @property
    def scores_bytes(self) -> int:
        return 4 * len(self.lengths) * self.heads * max(self.lengths) ** 2

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q, k, v and the mask of the keys; no mask when nothing is padded."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (len(self.lengths), self.heads, max(self.lengths), self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator, device=self.device).to(self.dtype) for _ in range(3))
        if len(set(self.lengths)) == 1:
            return q, k, v, None
        return (
            q,
            k,
            v,
            torch.arange(shape[2], device=self.device) < torch.tensor(self.lengths, device=self.device)[:, None],
        )


def here(names: Sequence[str], device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Attend], dict[str, str]]:
    """The kernels that are here, and why the others are not."""
    kernels: dict[str, Attend] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            kernels[name] = get_kernel(name, device, dtype)
        except KernelError as reason:
            missing[name] = str(reason)
    return kernels, missing


def errors(kernels: Mapping[str, Attend], case: Case) -> dict[str, dict[str, float]]:
    """How far each kernel is from the reference in float32."""
    q, k, v, mask = case.inputs()
    expected = reference(q.float(), k.float(), v.float(), mask)
    return {name: harness.difference(attend(q, k, v, mask), expected) for name, attend in kernels.items()}


def measure(kernels: Mapping[str, Attend], case: Case, rounds: int) -> dict[str, Any]:
    """Times of all kernels that can run the case, and why the others cannot."""
    inputs = case.inputs()
    contenders = dict(kernels)
    if inputs[3] is not None and "sdpa" in kernels:
        contenders["sdpa with mask"] = with_mask
    skipped: dict[str, str] = {}
    runs: dict[str, harness.Run] = {}
    for name, attend in contenders.items():
        run = synchronized(attend, inputs, case.device)
        if name == "reference" and case.scores_bytes > LARGEST_SCORES[case.device.type]:
            skipped[name] = "its scores would not fit"
            continue
        try:
            run()
        except (RuntimeError, ValueError, AssertionError) as failure:
            skipped[name] = f"{type(failure).__name__}: {str(failure)[:300]}"
        else:
            runs[name] = run
        free(case.device)
    times = harness.time_in_turns(runs, rounds)
    return {"kernels": summary(times, case.flops), "skipped": skipped}


def with_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
    """What `sdpa` does not do."""
    with sdpa.in_order(nvidia.capability(q.device)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[:, None, None, :])


def synchronized(attend: Attend, inputs: tuple[torch.Tensor | None, ...], device: torch.device) -> harness.Run:
    def run() -> None:
        attend(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def summary(times: Mapping[str, list[float]], flops: int) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "median_s": statistics.median(series),
            "min_s": min(series),
            "ratio_to_sdpa": harness.paired_ratio(series, times["sdpa"]) if "sdpa" in times else None,
            "flops_per_s": flops / statistics.median(series),
            "times_s": series,
        }
        for name, series in times.items()
    }


def print_case(case: Case, result: Mapping[str, Any]) -> None:
    print(f"\n{case.name} tokens, {str(case.dtype).removeprefix('torch.')}")
    print(f"  {'':<16}{'median s':>10}{'/ sdpa':>9}{'TFLOP/s':>10}")
    for name, row in result["kernels"].items():
        ratio = "" if row["ratio_to_sdpa"] is None else f"{row['ratio_to_sdpa']:.3f}"
        print(f"  {name:<16}{row['median_s']:>10.4f}{ratio:>9}{row['flops_per_s'] / 1e12:>10.3f}")
    harness.print_skipped(result["skipped"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--visual-tokens", type=int, nargs="+")
    parser.add_argument("--text-tokens", type=int, default=256, help="of the one prompt, and of the batch's first")
    parser.add_argument("--ragged-text-tokens", type=int, default=32, help="of the batch's second prompt")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/attention.json, or attention-cuda.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try --device cpu")
    defaults = DEFAULTS[options.device]
    options.heads = options.heads or defaults.heads
    options.visual_tokens = options.visual_tokens or defaults.visual_tokens
    options.dtype = options.dtype or defaults.dtypes
    options.output = options.output or harness.RESULTS / f"attention{'-cuda' if options.device == 'cuda' else ''}.json"
    return options


@torch.inference_mode()
def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    one, ragged = (options.text_tokens,), (options.text_tokens, options.ragged_text_tokens)
    results = {}
    for dtype_name in options.dtype:
        dtype = harness.DTYPES[dtype_name]
        kernels, missing = here(options.kernels, device, dtype)
        harness.print_skipped(missing)
        off = errors(kernels, Case(2, options.head_dim, 500, (40, 7), dtype, device))
        for name, values in off.items():
            print(
                f"  {name} - float32 reference: max {values['max_abs']:.2e}, relative RMS {values['relative_rms']:.2e}"
            )
        measured = {}
        for visual in options.visual_tokens:
            for text in (one, ragged):
                case = Case(options.heads, options.head_dim, visual, text, dtype, device)
                measured[case.name] = result = measure(kernels, case, options.rounds)
                print_case(case, result)
        results[dtype_name] = {"missing": missing, "errors": off, "cases": measured}
        if "flash" in kernels:
            results[dtype_name]["flash_is"] = flash.provider_for(device)[0]
    harness.write_json(
        options.output,
        {
            "benchmark": "attention",
            "environment": {**harness.environment(), **hardware(device)},
            "settings": {name: value for name, value in vars(options).items() if name != "output"},
            "results": results,
        },
    )
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    main()
