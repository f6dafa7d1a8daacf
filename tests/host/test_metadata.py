"""What was posted is in every file that the host writes, letter for letter."""

import json
from pathlib import Path
from typing import Any

import av
import pytest
from harness import RunningHost, workflow
from PIL import Image
from safetensors import safe_open

from scripts import comfyui

TEXTS = {
    "quotes": "a \"red\" circle, 'single' and `back`, \\ and \\n and %s {0} $HOME",
    "emoji": "a 🔴 moving → on ⬛ 👩‍👩‍👧‍👦",
    "newlines": "a red circle\nmoving right\r\n\ton a black background\n",
    "markup": "<img src=x onerror=alert(1)> </script><script>alert(1)</script> &amp; &lt;",
    "chinese": "黑色背景上一个向右移动的红色圆圈",
    "control": "bell \x07, delete \x7f, line separator \u2028, right to left \u202e",
}
MAKE, MODEL = 0x010F, 0x0110  # where the host's WebP keeps what was posted


def graph() -> dict[str, Any]:
    """The workflow that goes with the prompt, as the page would post it."""
    path = comfyui.REPO / "workflows" / "text_to_video_tiny.json"
    return json.loads(path.read_text(encoding="utf-8"))


def posted(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prompt that writes every kind of file, and its workflow, both with this text."""
    prompt, page = workflow("text_to_video_tiny"), graph()
    prompt["4"]["inputs"]["text"] = text
    (node,) = [node for node in page["nodes"] if node["id"] == 4]
    node["widgets_values"][0] = text
    prompt["6"]["inputs"]["frames"], prompt["7"]["inputs"]["steps"] = 7, 2
    webp = {"fps": 30.0, "lossless": False, "quality": 80, "method": "fastest"}
    extra = {
        "10": ("SaveAnimatedWEBP", {"images": ["8", 0], "filename_prefix": "meta/clip", **webp}),
        "11": ("SaveImage", {"images": ["8", 0], "filename_prefix": "meta/frame"}),
        "12": ("SaveLatent", {"samples": ["7", 0], "filename_prefix": "meta/latent"}),
    }
    prompt |= {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in extra.items()}
    return prompt, page


def as_posted(metadata: dict[str, str]) -> dict[str, Any]:
    """The prompt in a file without what the host wrote into it: the state of the loaders' files, for its cache."""
    prompt = json.loads(metadata["prompt"])
    marked = {node["class_type"] for node in prompt.values() if node.pop("is_changed", None) is not None}
    assert marked == {"MochiVideoT5Loader", "MochiVideoDiTLoader", "MochiVideoVAELoader"}
    return prompt


def of_mp4(path: Path) -> dict[str, str]:
    with av.open(str(path)) as container:
        return dict(container.metadata)


def of_png(path: Path) -> dict[str, str]:
    with Image.open(path) as picture:
        return dict(picture.text)  # type: ignore[attr-defined]


def of_webp(path: Path) -> dict[str, str]:
    with Image.open(path) as picture:
        exif = picture.getexif()
    return dict(exif[tag].split(":", 1) for tag in (MAKE, MODEL))


def of_latent(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_file_carries_the_prompt_and_the_workflow_as_posted(host: RunningHost, text: str) -> None:
    prompt, page = posted(text)
    outputs = host.run_as_page(prompt, page)
    readers = {".mp4": of_mp4, ".webp": of_webp, ".png": of_png, ".latent": of_latent}
    found = {path.suffix: readers[path.suffix](path) for path in host.saved(outputs)}
    assert found.keys() == readers.keys()
    for kind, metadata in found.items():
        assert as_posted(metadata) == prompt, kind
        assert json.loads(metadata["workflow"]) == page, kind
        assert as_posted(metadata)["4"]["inputs"]["text"] == text, kind


def test_every_frame_of_a_clip_carries_them_too(host: RunningHost) -> None:
    prompt, page = posted("a red circle")
    outputs = host.run_as_page(prompt, page)
    frames = [path for path in host.saved(outputs) if path.suffix == ".png"]
    assert len(frames) == 7
    assert all(json.loads(of_png(path)["workflow"]) == page for path in frames)


def test_what_the_player_shows_carries_them_too(host: RunningHost) -> None:
    prompt, page = posted(TEXTS["quotes"])
    prompt["8"]["inputs"]["player"] = True
    (shown,) = (files for key, files in host.run_as_page(prompt, page)["8"].items())
    metadata = of_mp4(host.base / shown[0]["type"] / shown[0]["subfolder"] / shown[0]["filename"])
    assert as_posted(metadata) == prompt
    assert json.loads(metadata["workflow"]) == page


def test_a_script_that_posts_no_workflow_leaves_only_the_prompt(host: RunningHost) -> None:
    prompt, _ = posted("a red circle, from a script")
    outputs = host.run(prompt)
    for path in host.saved(outputs):
        if path.suffix in (".mp4", ".png", ".latent"):
            metadata = {".mp4": of_mp4, ".png": of_png, ".latent": of_latent}[path.suffix](path)
            assert as_posted(metadata) == prompt
            assert "workflow" not in metadata


def test_a_prompt_read_back_from_a_video_runs_and_gives_the_same_file(host: RunningHost) -> None:
    prompt, _ = posted(TEXTS["emoji"])
    (first,) = [path for path in host.saved(host.run(prompt)) if path.suffix == ".mp4"]
    again = as_posted(of_mp4(first))
    again["9"]["inputs"]["filename_prefix"] = "video/again"
    (second,) = [path for path in host.saved(host.run(again)) if path.name.startswith("again")]
    assert pictures(first) == pictures(second)


def pictures(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]
