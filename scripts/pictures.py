"""`make pictures`: every picture of the docs, taken from the real page.

- beside each workflow a thumbnail of what it made, and a screenshot of its graph in docs/images/workflows
- a picture of each node for its help page
- the page while it samples and with the finished video, in both of its renderers

Everything runs with the embedded checkpoint: its files, sizes and steps take the place of the workflow's.
"""

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
from PIL import Image
from playwright.sync_api import Browser
from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from scripts import comfyui, on_tiny, workflows  # noqa: E402
from scripts.page import TINY, WORKFLOWS, Canvas, browser  # noqa: E402

DOCS = REPO / "docs" / "images"
NODES = REPO / "js" / "docs" / "images"
THUMBNAIL_SIDE = 200
PROMPTS = {
    "batch_of_prompts": "a green box moving right on a black background",
    "latents_save": "a white circle rising on a black background",
    "lora": "a yellow circle moving left on a blue background",
    "lora_stack": "a red box getting bigger on a white background",
    "text_to_video": "a green triangle rising on a black background",
    "text_to_video_fast_preview": "a blue circle bouncing on a white background",
    "text_to_video_fastmochi": "an orange box getting bigger on a black background",
    "text_to_video_low_vram": "a purple triangle getting smaller on a white background",
    "train_lora_tiny": "a red circle zigzagging on a black background",
    "text_to_video_tiny": "a red circle moving right on a black background",
    "video_to_video": "a red circle rising on a gray background",
}
PREVIEW = ".mochi-video-preview canvas"
VIDEO = ".mochi-video-player video"
TRAINED = ("MochiVideoPrepareDataset", "MochiVideoTrainLora")
SAMPLE = ".mochi-video-training video"


def thumbnail(path: Path, target: Path) -> None:
    """Four frames of a video, the first to the last, as one picture; of a wide one two."""
    with av.open(str(path)) as video:
        frames = [frame.to_image() for frame in video.decode(video=0)]
    sheet = Image.new("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
    columns = 1 if frames[0].width > frames[0].height else 2
    for index in range(2 * columns):
        frame = frames[round(index * (len(frames) - 1) / (2 * columns - 1))]
        width = 2 * THUMBNAIL_SIDE // columns
        place = (index % columns * width, index // columns * THUMBNAIL_SIDE)
        sheet.paste(frame.resize((width, THUMBNAIL_SIDE)), place)
    sheet.save(target, quality=85)


def thumbnails(host: comfyui.Host) -> None:
    """Runs every workflow, on prompts that the embedded checkpoint knows.

    The one that only saves latents is shown by what they become, a training by the one of the embedded checkpoint.
    """
    saved = PROMPTS["latents_save"]
    on_tiny.put_inputs(host, **on_tiny.LOOK, text=saved)
    for path in tqdm(workflows.graph_files(), desc="Thumbnails"):
        shown = {"latents_save": "latents_decode", "train_lora": "train_lora_tiny"}.get(path.stem, path.stem)
        prompt = on_tiny.prompt(on_tiny.read(shown), **on_tiny.LOOK, text=PROMPTS.get(shown, saved))
        thumbnail(host.saved(host.run(prompt))[0], path.with_suffix(".jpg"))


def save(png: bytes, target: Path) -> None:
    """A screenshot, in so few colours as one can do with."""
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(target, optimize=True)


def graph(canvas: Canvas, path: Path) -> None:
    """A workflow as it is when it has been dropped and its missing files have been told."""
    canvas.drop_workflow(path)
    # However small a large graph is, it has its words.
    canvas.page.evaluate("window.app.extensionManager.setting.set('LiteGraph.Canvas.MinFontSizeForLOD', 0)")
    canvas.look_at()
    canvas.page.wait_for_timeout(1200)  # the cost lines have their answers
    canvas.page.keyboard.press("Escape")
    canvas.page.wait_for_timeout(400)
    save(canvas.page.screenshot(), DOCS / "workflows" / f"{path.stem}.png")


def nodes(canvas: Canvas) -> None:
    """Each node by itself; those that show something, with what they show after a run."""
    kinds = sorted(name for name in canvas.host.get("/object_info") if name.startswith("MochiVideo"))
    shown = {"MochiVideoSampler": PREVIEW, "MochiVideoDecode": VIDEO, "MochiVideoSize": ".mochi-video-cost"}
    for kind in tqdm(kinds, desc="Nodes"):
        if kind in shown or kind in TRAINED:
            continue
        canvas.clear()
        canvas.page.evaluate(
            """(kind) => {
                const node = window.LiteGraph.createNode(kind)
                node.pos = [0, 0]
                window.app.graph.add(node)
                node.setSize([Math.max(340, node.size[0]), node.computeSize()[1]])
            }""",
            kind,
        )
        save(canvas.shot_of(kind), NODES / f"{kind}.png")
    canvas.drop_workflow(TINY)
    canvas.run()
    canvas.page.wait_for_function("(name) => document.querySelector(name)?.currentTime > 0.2", arg=VIDEO)
    for kind in shown:
        save(canvas.shot_of(kind), NODES / f"{kind}.png")
    canvas.drop_workflow(WORKFLOWS / "train_lora_tiny.json")
    canvas.run(timeout=600)
    canvas.page.wait_for_function("(name) => document.querySelector(name)?.currentTime > 0.2", arg=SAMPLE)
    for kind in TRAINED:
        save(canvas.shot_of(kind), NODES / f"{kind}.png")


def at_work(canvas: Canvas, name: str) -> None:
    """The page while it samples, and when it is done."""
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 200)
    canvas.look_at()
    canvas.queue()
    canvas.page.wait_for_function("() => window.mochiProgress > 140")
    save(canvas.page.screenshot(), DOCS / f"sampling_{name}.png")
    canvas.wait_for_end()
    canvas.page.wait_for_function("(name) => document.querySelector(name)?.currentTime > 0.2", arg=VIDEO)
    save(canvas.page.screenshot(), DOCS / f"finished_{name}.png")


def take(host: comfyui.Host, running: Browser, picture: Callable[..., None], *given: Any, vue: bool = False) -> None:
    """A picture from a tab of its own."""
    canvas = Canvas(running, host, vue=vue)
    try:
        picture(canvas, *given)
    finally:
        canvas.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with comfyui.Host(base, base / "output", base / "comfyui.log") as host, browser() as running:
            thumbnails(host)
            take(host, running, at_work, "litegraph")
            take(host, running, at_work, "nodes_2", vue=True)
            take(host, running, nodes)
            for path in tqdm(workflows.graph_files(), desc="Workflows"):
                take(host, running, graph, path)


if __name__ == "__main__":
    main()
