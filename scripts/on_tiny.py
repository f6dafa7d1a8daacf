"""The workflows with the embedded checkpoint: its files, sizes and few steps take the place of theirs, nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mochi_core.video_file import write_mp4
from mochi_core.weights.build import TINY_DIT, TINY_NAME
from scripts import comfyui, workflows

LORA_INPUTS = ("lora_name", "lora_1", "lora_2", "lora_3", "lora_4")
SIDE = 64
# What is quick, and what is worth a look.
QUICK: dict[str, int] = {"steps": 4, "frames": 13, "training": 4}
LOOK: dict[str, int] = {"steps": 30, "frames": 19}
EXAMPLE = "mochi-video-example"
# The video that is edited: not of the model's size, number of frames or rate.
VIDEO_FRAMES, VIDEO_FPS, VIDEO_HEIGHT, VIDEO_WIDTH = 20, 24, 80, 96


def read(name: str) -> dict[str, Any]:
    """One of the pack's API prompts."""
    return json.loads((workflows.GRAPHS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def prompt(
    workflow: dict[str, Any], *, steps: int, frames: int, training: int | None = None, text: str | None = None
) -> dict[str, Any]:
    """A workflow's prompt for the embedded checkpoint; a schedule that is split is split in its middle.

    `training` takes the place of a training's steps, when given, and `text` of what the video is to show.
    """
    files = dict.fromkeys(("t5_name", "dit_name", "vae_name"), TINY_NAME)
    substitutes = {**files, "width": SIDE, "height": SIDE, "frames": frames, "steps": steps, "step": steps // 2}
    changed = json.loads(json.dumps(workflow))
    for node in changed.values():
        inputs = node["inputs"]
        own = inputs.get("steps")
        inputs.update({name: value for name, value in substitutes.items() if name in inputs})
        if node["class_type"] == "MochiVideoTrainLora":
            inputs["steps"] = training or own
            inputs["sample_every"] = min(inputs["sample_every"], inputs["steps"])
            inputs["sample_steps"] = steps
        elif node["class_type"] == "MochiVideoPrepareDataset":
            inputs["folder"] = EXAMPLE
        if node["class_type"] == "MochiVideoSize":
            inputs["preset"] = "64x64 tiny"
        for name in ("text", "prompts"):
            if text is not None and inputs.get(name) and isinstance(inputs[name], str):
                inputs[name] = text
    return changed


def put_inputs(host: comfyui.Host, **look: Any) -> dict[str, Path]:
    """What the workflows read, under the names that they have for it: LoRAs, a video and latents.

    `look` is as for `prompt`. Returns the saved latents by the first part of their names.
    """
    folder, loras = host.base / "input", host.base / "models" / "loras"
    for place in (folder, loras):
        place.mkdir(parents=True, exist_ok=True)
    latents = []
    for path in workflows.graph_files():
        for node in read(path.stem).values():
            inputs = node["inputs"]
            for name in {inputs.get(key, "none") for key in LORA_INPUTS} - {"none"}:
                save_file(lora(), loras / name)
            if node["class_type"] == "LoadVideo":
                write_mp4(folder / inputs["file"], [moving_disc()], VIDEO_FPS)
            elif node["class_type"] == "LoadLatent":
                latents.append(inputs["latent"])
    outputs = host.run(prompt(read("latents_save"), **look))
    saved = {_begin(path.name): path for path in host.saved(outputs)}
    for name in latents:
        shutil.copy(saved[_begin(name)], folder / name)
    return saved


def _begin(name: str) -> str:
    """The name less the number that the host gave it."""
    return name.split("_0")[0]


def lora() -> dict[str, torch.Tensor]:
    """A LoRA for one layer of the embedded model, as genmo's trainer names it."""
    layer = "blocks.0.attn.proj_x"
    rows, columns = load_file(TINY_DIT)[f"{layer}.weight"].shape
    generator = torch.Generator().manual_seed(0)
    return {
        f"{layer}.lora_A": torch.randn(2, columns, generator=generator) * 0.1,
        f"{layer}.lora_B": torch.randn(rows, 2, generator=generator) * 0.1,
    }


def moving_disc() -> torch.Tensor:
    """A blue disc that rises on gray, `T H W 3`."""
    rows, columns = torch.arange(VIDEO_HEIGHT)[:, None], torch.arange(VIDEO_WIDTH)
    clip = torch.full((VIDEO_FRAMES, VIDEO_HEIGHT, VIDEO_WIDTH, 3), 0.5)
    for index in range(VIDEO_FRAMES):
        middle = VIDEO_HEIGHT * 0.75 - index * 2
        clip[index, (rows - middle) ** 2 + (columns - VIDEO_WIDTH / 2) ** 2 < 14**2] = torch.tensor([0.1, 0.2, 0.9])
    return clip
