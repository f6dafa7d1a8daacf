"""How many values the released VAE keeps alive for each pixel, beside its weights: what the nodes tell the host.

Counts the storages that tensor operations make, from the operation to the last reference, on a small picture: values a
pixel do not depend on its size. Run: `python benchmarks/vae_live_memory.py`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.live_bytes import LiveBytes
from mochi_core.shapes import PIXELS_PER_LATENT
from mochi_core.vae import Decoder, Encoder

RESULT = Path(__file__).parent / "results" / "vae_live_memory.json"


def random_weights(network: torch.nn.Module) -> torch.nn.Module:
    for parameter in network.parameters():
        parameter.data.normal_(std=0.02)
    return network.eval()


@torch.inference_mode()
def values_per_pixel(work: Callable[[], Any], pixels: int, value_bytes: int) -> int:
    with LiveBytes() as live:
        work()
    return round(live.peak / value_bytes / pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-size", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    size, dtype = options.latent_size, torch.bfloat16
    pixels, value_bytes = (size * PIXELS_PER_LATENT) ** 2, 2
    decoder = random_weights(Decoder(dtype=dtype))
    encoder = random_weights(Encoder(dtype=dtype))

    def streamed(latents: int) -> Callable[[], None]:
        def work() -> None:
            for _ in decoder.stream(torch.randn(1, 12, latents, size, size, dtype=dtype)):
                pass

        return work

    found: dict[str, dict[str, int]] = {"streaming decode": {}, "full decode": {}, "encode": {}}
    for latents in (2, 3, 5):
        frames = 6 * (latents - 1) + 1
        whole = torch.randn(1, 12, latents, size, size, dtype=dtype)
        video = torch.rand(1, 3, frames, size * PIXELS_PER_LATENT, size * PIXELS_PER_LATENT)
        found["streaming decode"][f"{frames} frames"] = values_per_pixel(streamed(latents), pixels, value_bytes)
        found["full decode"][f"{frames} frames"] = values_per_pixel(partial(decoder, whole), pixels, value_bytes)
        found["encode"][f"{frames} frames"] = values_per_pixel(partial(encoder, video, dtype), pixels, value_bytes)
    print(json.dumps(found, indent=1))
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
