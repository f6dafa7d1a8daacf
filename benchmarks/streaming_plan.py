"""What `memory.plan` makes of a budget, and whether the work keeps to it: counted at full size, without the memory.

    python benchmarks/streaming_plan.py [--width 848 --height 480 --frames 163] [--budgets 3 6 8 12 16 24]

A forward of the transformer and a decode run as planned, on tensors that have shapes and no memory, on a device that
need not be here; what they would hold is counted from the operation that makes them to their last reference, weights
included. (The decode does not grow with the clip: some latent frames are decoded.) That the count is the truth is shown
beside it: a small model runs really on the CPU, counted the same way, and by how much the process grows.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.live_bytes import LiveBytes
from mochi_core.attention import sdpa
from mochi_core.attention.joint import JointAttention
from mochi_core.config import MOCHI_1, TINY, DiTConfig, VAEConfig
from mochi_core.dit import AsymmDiT
from mochi_core.errors import MemoryBudgetError
from mochi_core.memory.blocks import streamed
from mochi_core.memory.copies import SideStream
from mochi_core.memory.frames import HostFrames
from mochi_core.memory.need import FEWEST_TOKENS, dit_activations
from mochi_core.memory.plan import DecodePlan, Networks, plan
from mochi_core.shapes import LatentSize, VideoSize
from mochi_core.vae import Decoder
from mochi_core.vae.causal_conv import KeptContext


@dataclass(frozen=True)
class Case:
    """One forward: how large, and over how many tokens at once."""

    config: DiTConfig
    size: LatentSize
    dtype: torch.dtype
    text_tokens: int = 256
    batch: int = 1
    tokens_at_once: int | None = None
    device: str = "cuda"

    def model(self, device: str) -> AsymmDiT:
        """The network, with whatever weights."""
        model = AsymmDiT(self.config, dtype=self.dtype, device=device).requires_grad_(False).eval()
        model.tokens_at_once = self.tokens_at_once
        return model

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Latents, noise level, text features and their mask."""
        shape = (self.batch, self.config.latent_channels, self.size.frames, self.size.height, self.size.width)
        return (
            torch.zeros(shape, dtype=self.dtype, device=self.device),
            torch.zeros(self.batch, device=self.device),
            torch.zeros(
                self.batch, self.text_tokens, self.config.text_feature_dim, dtype=self.dtype, device=self.device
            ),
            torch.ones(self.batch, self.text_tokens, dtype=torch.bool, device=self.device),
        )

    def need(self) -> int:
        """What `memory.need` says of it."""
        return dit_activations(
            self.config,
            self.size,
            batch=self.batch,
            text_tokens=self.text_tokens,
            dtype=self.dtype,
            tokens_at_once=self.tokens_at_once,
        )


# Counting


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made here have no memory; what a forward asks of their values, it is told: every text token is real."""
    with (
        FakeTensorMode(),
        mock.patch("mochi_core.dit.model.compact", lambda features, mask: (features.clone(), mask.clone())),
        mock.patch.object(torch.Tensor, "all", lambda mask: True),
        mock.patch("mochi_core.attention.joint.get_kernel", _kernel_for),
    ):
        yield


def _kernel_for(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    # torch asks a GPU which of its kernels to take, and here is none.
    return sdpa.attend if device.type == "cpu" else fused_attention


def fused_attention(q: torch.Tensor, *_: Any) -> torch.Tensor:
    """What a fused kernel makes: an output that lies as the queries do, and one float for each query and head."""
    sums, out = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device), torch.empty_like(q)
    del sums
    return out


def live_bytes(case: Case, resident: int | None = None) -> dict[str, int]:
    """The most bytes alive at once on the case's device in each part of one forward, inputs included.

    Weights are not, unless some blocks stay resident and the others are streamed to the device; then they are.
    """
    model = case.model(case.device if resident is None else "cpu")
    with torch.inference_mode(), LiveBytes() as live, ExitStack() as stack:
        if resident is not None:
            copies = SideStream(case.device, synchronous=True)
            blocks: Any = model.blocks
            stack.enter_context(streamed(model, blocks, case.device, resident=resident, copies=copies))
        inputs, parts = case.inputs(), _Parts(live, case.device)
        with parts.of(model):
            model(*inputs)
    return parts.peaks


class _Parts:
    """Notes the peak of each part of a forward as the next one begins."""

    def __init__(self, live: LiveBytes, device: str):
        self.peaks: dict[str, int] = {}
        self._live, self._device, self._part = live, device, ""

    def enter(self, part: str) -> None:
        peak = self._live.take_peak(self._device)
        if self._part:
            self.peaks[self._part] = max(self.peaks.get(self._part, 0), peak)
        self._part = part

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        for block in model.blocks:
            block.attn.register_forward_pre_hook(lambda *_: self.enter("queries, keys, values"))
            block.attn.register_forward_hook(lambda *_: self.enter("MLP"))
            block.attn.joint = partial(self._attend, block.attn.joint)
        model.final_layer.register_forward_pre_hook(lambda *_: self.enter("final layer"))
        self.enter("embedding")
        yield
        self.enter("")

    def _attend(self, joint: JointAttention, *streams: Any) -> Any:
        self.enter("attention")
        return joint(*streams)


def counted(case: Case, resident: int | None = None) -> dict[str, int]:
    """`live_bytes` of any size, in seconds."""
    with without_memory():
        return live_bytes(case, resident)


# Budgets


def denoise(case: Case) -> dict[str, Any]:
    """One forward of the DiT beside its weights: with nothing cut, and cut as far as is sensible."""
    # All blocks but the last are alike, and what is alive in one does not depend on how many were before it.
    whole = replace(case, config=replace(case.config, depth=2))
    cut = replace(whole, tokens_at_once=FEWEST_TOKENS)
    return {
        "whole": {"estimated_bytes": whole.need(), "counted_bytes": counted(whole)},
        "cut": {"estimated_bytes": cut.need(), "counted_bytes": counted(cut)},
    }


def within(case: Case, networks: Networks, budget: float, decoded_latents: int) -> dict[str, Any]:
    """What this budget gives, and the count of it."""
    try:
        # Where streamed weights wait makes no difference to the device.
        made = plan(budget, case.size.video, networks, case.device, text_tokens=case.text_tokens, host_bytes=0)
    except MemoryBudgetError as error:
        return {"budget_bytes": budget, "error": str(error)}
    parts = counted(replace(case, tokens_at_once=made.dit.tokens_at_once), made.dit.resident)
    decode = decode_bytes(networks.decoder.config, replace(case.size, frames=decoded_latents), made.decode, case)
    peaks = {"dit": max(parts.values()), "decode": decode}
    return {
        "budget_bytes": budget,
        "plan": str(made).splitlines(),
        "dit": asdict(made.dit) | {"estimated_bytes": made.dit.peak, "parts": parts},
        "decode": asdict(made.decode) | {"estimated_bytes": made.decode.peak},
        "peak_bytes": peaks,
        "fits": max(peaks.values()) <= budget,
    }


def decode_bytes(config: VAEConfig, size: LatentSize, how: DecodePlan, case: Case) -> int:
    """The most bytes alive on the device in a decode as planned, weights and latents included."""
    with FakeTensorMode(), torch.inference_mode(), LiveBytes() as live:
        decoder = Decoder(config, dtype=case.dtype, device=case.device).eval()
        store = HostFrames(case.device, how.frames_on_device, synchronous=True) if how.frames_on_host else None
        shape = (1, config.latent_channels, size.frames, size.height, size.width)
        latents = torch.empty(shape, dtype=case.dtype, device=case.device)
        for _ in decoder.stream(latents, context=KeptContext(store, how.values_at_once)):
            pass
    return live.peak_on[case.device]


# Reality


def compare(case: Case, threads: int) -> dict[str, Any]:
    """A small forward on the CPU: estimated, counted without memory, counted for real, and what the process grew."""
    torch.set_num_threads(threads)
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "tokens_at_once": case.tokens_at_once,
        "estimated_bytes": case.need(),
        "counted_bytes": max(counted(case).values()),
        "really_counted_bytes": max(live_bytes(case).values()),
        "peak_rss_growth_bytes": harness.peak_rss_growth(alone, case, threads),
    }


def alone(case: Case, threads: int) -> harness.Run:
    """The forward in a process of its own. What a first run sets up for good is not counted."""
    torch.set_num_threads(threads)
    model = case.model(case.device)
    smallest = replace(case, size=LatentSize(1, 2, 2))

    @torch.inference_mode()
    def run(case: Case = case) -> None:
        model(*case.inputs())

    run(smallest)
    return run


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def report(result: Mapping[str, Any]) -> None:
    """The result in a few lines."""
    for name, row in result["denoise"].items():
        print(f"{name}: {', '.join(f'{part} {megabytes(peak)}' for part, peak in row['counted_bytes'].items())}")
    for row in result["budgets"]:
        if "error" in row:
            print(f"{row['budget_bytes'] / 1e9:g} GB: {row['error']}")
            continue
        print("\n".join(row["plan"]))
        peaks = (f"{name} {megabytes(peak)}" for name, peak in row["peak_bytes"].items())
        print(f"  counted {', '.join(peaks)}: {'fits' if row['fits'] else 'DOES NOT FIT'}")
    for row in result["reality"]:
        values = ", ".join(f"{key[:-6]} {megabytes(value)}" for key, value in row.items() if key.endswith("_bytes"))
        print(f"{row['dtype']}, {row['tokens_at_once'] or 'all'} tokens at once: {values}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=("released", "tiny"), default="released")
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=163)
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--budgets", nargs="+", type=float, default=[3, 6, 8, 12, 16, 24], help="GB, of 1e9 bytes")
    parser.add_argument("--decoded-latents", type=int, default=2, help="latent frames that are decoded")
    parser.add_argument("--real-latents", type=harness.size, default=(8, 48, 48), help="of the small model")
    parser.add_argument("--real-width", type=int, default=768, help="of the small model's visual stream")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=list(harness.DTYPES), help="there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "streaming_plan.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    model = MOCHI_1 if options.config == "released" else TINY
    config, networks = model.dit, Networks.released(model)
    size = VideoSize(options.width, options.height, options.frames).latent
    full = Case(config, size, torch.bfloat16, text_tokens=options.text_tokens)
    width = options.real_width
    small = DiTConfig(depth=2, heads=6, visual_dim=width, text_dim=width // 2, text_feature_dim=1024)
    real = Case(small, LatentSize(*options.real_latents), torch.float32, text_tokens=64, device="cpu")
    result = {
        "benchmark": "streaming_plan",
        "environment": harness.environment(),
        "settings": {
            "config": asdict(config),
            "video": asdict(size.video),
            "text_tokens": options.text_tokens,
            "real_config": asdict(small),
            "real_latents": options.real_latents,
        },
        "denoise": denoise(full),
        "budgets": [within(full, networks, budget * 1e9, options.decoded_latents) for budget in options.budgets],
        "reality": [
            compare(replace(real, dtype=harness.DTYPES[name], tokens_at_once=tokens), options.threads)
            for name in options.dtype
            for tokens in (None, FEWEST_TOKENS)
        ],
    }
    report(result)
    harness.write_json(options.output, result)
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    main()
