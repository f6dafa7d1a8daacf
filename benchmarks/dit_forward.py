"""One forward of the DiT: ours, diffusers', ComfyUI's own, and the floor, on identical weights and inputs.

    python benchmarks/dit_forward.py [--dtype float32 bfloat16] [--rounds 15] [--latents 4x32x32] ...

All compute the same function, and their outputs are compared before they are timed. Ours gets the padded prompt with
its mask, the peers the prompt cropped to its valid tokens. The floor is ours' linear layers, convolutions and one
attention a block, without anything between them. The defaults are a medium model that a CPU runs in half a second.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, peers
from benchmarks.floor import Floor
from mochi_core.config import DiTConfig
from mochi_core.dit import AsymmDiT

SIGNS = {"native": -1}


@dataclass(frozen=True)
class Case:
    """What is run: one architecture, one input shape, one dtype."""

    config: DiTConfig
    latents: tuple[int, int, int]
    text_tokens: int
    text_slots: int
    dtype: torch.dtype
    threads: int

    def inputs(self) -> peers.DiTInputs:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, self.config.latent_channels, *self.latents, generator=generator)
        features = torch.randn(1, self.text_slots, self.config.text_feature_dim, generator=generator)
        mask = torch.arange(self.text_slots)[None] < self.text_tokens
        return peers.DiTInputs(latents.to(self.dtype), torch.tensor([0.5]), features.to(self.dtype), mask)

    def model(self) -> AsymmDiT:
        model = AsymmDiT(self.config, dtype=self.dtype, device="meta").to_empty(device="cpu")
        harness.randomize(model)
        return model


def contender(name: str, model: AsymmDiT, inputs: peers.DiTInputs) -> harness.Run:
    """A callable that runs one forward of this implementation with the weights of `model`."""
    if name == "ours":
        return lambda: model(inputs.latents, inputs.sigma, inputs.features, inputs.mask)
    if name == "diffusers":
        diffusers = peers.diffusers_dit(model.config, model.state_dict())
        return lambda: peers.run_diffusers_dit(diffusers, inputs)
    native = peers.native_dit(model.config, model.state_dict())
    return lambda: peers.run_native_dit(native, inputs)


def alone(name: str, case: Case) -> harness.Run:
    """The contender in a process of its own."""
    torch.set_num_threads(case.threads)
    run = contender(name, case.model(), case.inputs())
    gc.collect()
    return torch.inference_mode()(run)


def floor_of(model: nn.Module, run: harness.Run) -> Floor:
    floor = Floor()
    with floor.recording(model):
        run()
    return floor


@torch.inference_mode()
def measure(case: Case, peer_names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Differences, times and memory of all contenders that are here."""
    model, inputs = case.model(), case.inputs()
    runs: dict[str, harness.Run] = {}
    skipped: dict[str, str] = {}
    for name in ("ours", *peer_names):
        try:
            runs[name] = contender(name, model, inputs)
        except peers.PeerUnavailable as reason:
            skipped[name] = str(reason)
    reference = runs["ours"]()
    differences = {
        name: harness.difference(SIGNS.get(name, 1) * run(), reference) for name, run in runs.items() if name != "ours"
    }
    floor = floor_of(model, runs["ours"])
    times = harness.time_in_turns({**runs, "floor": floor.replay}, rounds)
    memory = {name: harness.peak_rss_growth(alone, name, case) for name in runs}
    return {"differences": differences, "skipped": skipped, "contenders": harness.summary(times, memory)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--visual-dim", type=int, default=768)
    parser.add_argument("--text-dim", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--text-features", type=int, default=1024, help="width of the text features")
    parser.add_argument("--latents", type=harness.size, default=(4, 32, 32), help="latent frames x rows x columns")
    parser.add_argument("--text-tokens", type=int, default=64, help="valid ones of --text-slots")
    parser.add_argument("--text-slots", type=int, default=256)
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=list(harness.DTYPES))
    parser.add_argument("--peers", nargs="*", choices=peers.NAMES, default=peers.NAMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "dit_forward.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    config = DiTConfig(
        depth=options.depth,
        heads=options.heads,
        visual_dim=options.visual_dim,
        text_dim=options.text_dim,
        text_feature_dim=options.text_features,
    )
    results = {}
    for name in options.dtype:
        dtype = harness.DTYPES[name]
        case = Case(config, options.latents, options.text_tokens, options.text_slots, dtype, options.threads)
        results[name] = result = measure(case, options.peers, options.rounds)
        harness.print_table(f"DiT forward, {name}", result["contenders"])
        harness.print_differences(result["differences"])
        harness.print_skipped(result["skipped"])
    harness.write_json(
        options.output,
        {
            "benchmark": "dit_forward",
            "environment": harness.environment(),
            "peers": peers.versions(),
            "settings": {
                "config": asdict(config),
                "latents": options.latents,
                "text_tokens": options.text_tokens,
                "text_slots": options.text_slots,
                "rounds": options.rounds,
            },
            "results": results,
        },
    )
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    main()
