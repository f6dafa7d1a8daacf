"""One decode of latents to frames: ours whole and streamed, ComfyUI's own, diffusers', and the floor.

    python benchmarks/vae_decode.py [--dtype float32 bfloat16] [--latent-frames 3 7 13] [--rounds 5] ...

`ours stream` decodes one latent frame at a time and collects the pieces in a list. diffusers' decoder has the same
weights but computes another function: it drops the superfluous frames at the end, not where they arise, so that its
early frames differ and it does more work. The floor is the convolutions and linear layers of ours, whole, in ours'
memory layout. The defaults are a medium decoder that a CPU runs in seconds.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, peers
from benchmarks.floor import Floor
from mochi_core.config import StagesConfig, VAEConfig
from mochi_core.vae import Decoder


@dataclass(frozen=True)
class Case:
    """What is run: one architecture, one latent shape, one dtype."""

    config: VAEConfig
    latents: tuple[int, int, int]
    dtype: torch.dtype
    threads: int

    def inputs(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(1, self.config.latent_channels, *self.latents, generator=generator).to(self.dtype)

    def model(self) -> Decoder:
        model = Decoder(self.config, dtype=self.dtype, device="meta").to_empty(device="cpu")
        harness.randomize(model)
        return model


def contender(name: str, model: Decoder, latents: torch.Tensor) -> harness.Run:
    """A callable that decodes once with this implementation and the weights of `model`."""
    if name == "ours":
        return lambda: model(latents)
    if name == "ours stream":
        return lambda: list(model.stream(latents))
    if name == "native":
        native = peers.native_decoder(model.config, model.state_dict())
        return lambda: native(latents)
    diffusers = peers.diffusers_decoder(model.config, model.state_dict())
    return lambda: peers.run_diffusers_decoder(diffusers, model.config, latents)


def alone(name: str, case: Case) -> harness.Run:
    """The contender in a process of its own."""
    torch.set_num_threads(case.threads)
    run = contender(name, case.model(), case.inputs())
    gc.collect()
    return torch.inference_mode()(run)


def differences(runs: dict[str, harness.Run]) -> dict[str, dict[str, float]]:
    """How far the others are from ours; of diffusers also the last frames alone."""
    reference = runs["ours"]()
    found = {"ours stream": harness.difference(torch.cat(runs["ours stream"](), dim=2), reference)}
    if "native" in runs:
        found["native"] = harness.difference(runs["native"](), reference)
    if "diffusers" in runs:
        frames = runs["diffusers"]()
        found["diffusers"] = harness.difference(frames, reference)
        found["diffusers, last frame"] = harness.difference(frames[:, :, -1], reference[:, :, -1])
    return found


@torch.inference_mode()
def measure(case: Case, peer_names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Differences, times and memory of all contenders that are here."""
    model, latents = case.model(), case.inputs()
    runs: dict[str, harness.Run] = {}
    skipped: dict[str, str] = {}
    for name in ("ours", "ours stream", *peer_names):
        try:
            runs[name] = contender(name, model, latents)
        except peers.PeerUnavailable as reason:
            skipped[name] = str(reason)
    found = differences(runs)
    floor = Floor()
    with floor.recording(model):
        runs["ours"]()
    times = harness.time_in_turns({**runs, "floor": floor.replay}, rounds)
    memory = {name: harness.peak_rss_growth(alone, name, case) for name in runs}
    return {"differences": found, "skipped": skipped, "contenders": harness.summary(times, memory)}


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """The options of the decoder that is measured; `decoder_of` makes its config."""
    parser.add_argument("--base", type=int, default=64, help="base channels of the medium decoder")
    parser.add_argument("--multipliers", type=int, nargs=4, default=(1, 2, 4, 6))
    parser.add_argument("--res-blocks", type=int, nargs=5, default=(1, 1, 2, 2, 1))
    parser.add_argument("--rows", type=int, default=16, help="latent rows and columns")
    parser.add_argument("--peers", nargs="*", choices=peers.NAMES, default=peers.NAMES)
    parser.add_argument("--threads", type=int, default=1)


def decoder_of(options: argparse.Namespace) -> VAEConfig:
    stages = StagesConfig(options.base, tuple(options.multipliers), tuple(options.res_blocks), (False,) * 5)
    return VAEConfig(decoder=stages)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_decoder(parser)
    parser.add_argument("--latent-frames", type=int, nargs="+", default=(3, 7, 13))
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=list(harness.DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "vae_decode.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    config = decoder_of(options)
    results: dict[str, dict[str, Any]] = {}
    for name in options.dtype:
        results[name] = {}
        for frames in options.latent_frames:
            case = Case(config, (frames, options.rows, options.rows), harness.DTYPES[name], options.threads)
            results[name][str(frames)] = result = measure(case, options.peers, options.rounds)
            harness.print_table(f"Decoder, {frames} latent frames, {name}", result["contenders"])
            harness.print_differences(result["differences"])
            harness.print_skipped(result["skipped"])
    if "diffusers" in options.peers:
        print("\ndiffusers computes another function in the early frames: see --help")
    harness.write_json(
        options.output,
        {
            "benchmark": "vae_decode",
            "environment": harness.environment(),
            "peers": peers.versions(),
            "settings": {
                "decoder": asdict(config.decoder),
                "latent_frames": options.latent_frames,
                "rows": options.rows,
                "rounds": options.rounds,
            },
            "results": results,
        },
    )
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    main()
