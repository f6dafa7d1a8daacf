"""`make demo`: a real ComfyUI makes a video from a prompt with the embedded checkpoint, through its API queue."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import comfyui

WORKFLOW = comfyui.REPO / "workflows" / "api" / "text_to_video_tiny.json"
OUTPUT = comfyui.REPO / "output"


def main() -> None:
    prompt: dict[str, Any] = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    titles = {node_id: node["_meta"]["title"] for node_id, node in prompt.items()}
    bar: tqdm[Any] | None = None

    def finish() -> None:
        if bar is not None:
            bar.n = bar.total
            bar.refresh()
            bar.close()

    def show(kind: str, data: dict[str, Any]) -> None:
        nonlocal bar
        if kind == "executing" and data.get("node"):
            finish()
            bar = tqdm(desc=titles[data["node"]], total=1, bar_format="{desc:<28} {bar:30} {n_fmt}/{total_fmt}")
        elif kind == "progress" and bar is not None:
            bar.total, bar.n = data["max"], data["value"]
            bar.refresh()

    with tempfile.TemporaryDirectory() as base:
        log = Path(base) / "comfyui.log"
        print(f"Starting ComfyUI from {comfyui.fetch()} ...")
        with comfyui.Host(Path(base), OUTPUT, log) as host:
            outputs = host.run(prompt, show)
        finish()
        (video,) = host.saved(outputs)
    print(f"Prompt: {next(node['inputs']['text'] for node in prompt.values() if node['inputs'].get('text'))}")
    print(f"Video:  {video}")


if __name__ == "__main__":
    main()
