"""Fits the colours of a checkpoint's previews to its own videos, and writes them into the DiT's metadata.

Without arguments for the embedded checkpoint. Only the header of the file changes; the tensors stay byte for byte.
"""

import json
import struct
import sys
from pathlib import Path

import torch
from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from mochi_core.pipeline import MochiPipeline, TextToVideo  # noqa: E402
from mochi_core.preview import LatentColours, at_latent_size  # noqa: E402
from mochi_core.sampling.schedule import linear_quadratic  # noqa: E402
from mochi_core.shapes import VideoSize  # noqa: E402
from mochi_core.weights.build import TINY_DIT  # noqa: E402

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
SHAPES = ("circle", "box", "triangle")
BACKGROUNDS = ("black", "white", "gray", "blue", "yellow", "green", "red")
MOTIONS = ("moving right", "rising", "getting bigger", "bouncing")
SIZE = VideoSize(64, 64, 13)


def prompts() -> list[str]:
    """Every colour on every background, with a shape and a motion in turn."""
    pairs = [(colour, ground) for colour in COLOURS for ground in BACKGROUNDS if colour != ground]
    return [
        f"a {colour} {SHAPES[index % len(SHAPES)]} {MOTIONS[index % len(MOTIONS)]} on a {ground} background"
        for index, (colour, ground) in enumerate(pairs)
    ]


def fit(pipeline: MochiPipeline) -> tuple[LatentColours, float]:
    """The colours, and the share of the videos' variance at latent size that they explain."""
    latents, videos = [], []
    for seed, prompt in enumerate(tqdm(prompts(), desc="Sampling")):
        request = TextToVideo(prompt, size=SIZE, schedule=linear_quadratic(20), cfg=4.0, seed=seed)
        sampled = pipeline.sample(request)
        latents.append(pipeline.statistics.to_model_space(sampled))
        videos.append(torch.cat(list(pipeline.decode(sampled)), dim=1))
    colours = LatentColours.fitted(torch.cat(latents), torch.cat(videos))
    seen = torch.cat([colours.pictures(clip[0]) for clip in latents]).float() / 255
    return colours, _explained(seen, torch.cat(videos))


def _explained(pictures: torch.Tensor, videos: torch.Tensor) -> float:
    """How much of the videos at latent size the pictures say, 1 being all."""
    small = at_latent_size(videos).flatten(0, 1)
    return 1 - ((pictures - small) ** 2).mean().item() / ((small - small.mean((0, 1, 2))) ** 2).mean().item()


def write_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Adds to a safetensors file's metadata; the tensors are copied as they are."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    unfinished.replace(path)


if __name__ == "__main__":
    colours, explained = fit(MochiPipeline.tiny())
    write_metadata(TINY_DIT, colours.metadata)
    print(f"{TINY_DIT}: the colours explain {explained:.1%} of the variance")
