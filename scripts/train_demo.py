"""Teaches the embedded model a motion from 20 clips, and shows what it made of the words before and after.

Run by `make train-demo`; a few minutes on two cores. Fails when the motion was there before, or is not afterwards.
"""

import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from mochi_core.pipeline import MochiPipeline, TextToVideo  # noqa: E402
from mochi_core.sampling.schedule import linear_quadratic  # noqa: E402
from mochi_core.shapes import VideoSize  # noqa: E402
from mochi_core.training import EXAMPLE_CLIPS  # noqa: E402
from mochi_core.training.config import read_config  # noqa: E402
from mochi_core.training.loop import Step  # noqa: E402
from mochi_core.training.prepare import PrepareModels, PrepareOptions, prepare  # noqa: E402
from mochi_core.training.tiny.classifier import classify  # noqa: E402
from mochi_core.training.trainer import train  # noqa: E402
from mochi_core.weights.lora import attached, branches  # noqa: E402
from mochi_core.weights.lora_file import read_lora  # noqa: E402
from scripts.example_clips import other_scenes  # noqa: E402

FOLDER = REPO / "output" / "train_demo"
CONFIG = Path(__file__).with_name("train_demo.yaml")
SIZE = VideoSize(64, 64, 19)
SCENES = 24
SHOWN = 8
GUIDANCE = 3.0
# What must be seen, of all videos.
MOST_BEFORE, LEAST_AFTER = 0.1, 0.8


def main() -> int:
    started = time.perf_counter()
    print(prepare(EXAMPLE_CLIPS, FOLDER / "dataset", PrepareOptions((SIZE,)), PrepareModels.tiny()))
    config, _ = read_config(CONFIG, dataset=str(FOLDER / "dataset"), output=str(FOLDER / "lora"))
    with tqdm(total=config.steps, desc="Training") as bar:

        def watch(done: Step) -> None:
            bar.update(done.step - bar.n)
            bar.set_postfix(loss=f"{done.loss:.3f}")

        path = train(config, watch)
    pipeline = MochiPipeline.tiny()
    before = videos(pipeline, "Before")
    with attached(pipeline.dit, branches([(read_lora(path, pipeline.dit), 1.0)])):
        after = videos(pipeline, "After")
    strips = FOLDER / "before_and_after.png"
    picture(before, after).save(strips)
    shares = [share(made) for made in (before, after)]
    print(f"The motion is seen in {shares[0]:.0%} of {SCENES} videos before, in {shares[1]:.0%} after")
    print(f"{strips}: each prompt before, and below it after; {time.perf_counter() - started:.0f} s")
    return 0 if shares[0] <= MOST_BEFORE and shares[1] >= LEAST_AFTER else 1


def videos(pipeline: MochiPipeline, name: str) -> list[torch.Tensor]:
    """One of each scene, `T H W 3`; none of them is a scene of the clips."""
    schedule = linear_quadratic(20)
    requests = [
        TextToVideo(scene.caption(), size=SIZE, schedule=schedule, cfg=GUIDANCE, seed=seed)
        for seed, scene in enumerate(other_scenes()[:SCENES])
    ]
    return [pipeline(request) for request in tqdm(requests, desc=name)]


def share(made: list[torch.Tensor]) -> float:
    """In how many of the videos the classifier sees the motion."""
    return sum(classify(video).motion == scene.motion for video, scene in zip(made, other_scenes())) / len(made)


def picture(before: list[torch.Tensor], after: list[torch.Tensor]) -> Image.Image:
    """Every third frame of the first videos, before and below it after."""
    rows = []
    for pair in list(zip(before, after))[:SHOWN]:
        rows += [torch.cat(list(video[::3]), dim=1) for video in pair]
        rows.append(torch.full((4, rows[0].shape[1], 3), 0.5))
    pixels = (torch.cat(rows) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize((2 * pixels.shape[1], 2 * pixels.shape[0]))


if __name__ == "__main__":
    sys.exit(main())
