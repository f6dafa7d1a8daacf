"""A short way to write API prompts, and a host that hands back what its probe nodes wrote."""

import json
import subprocess
import sys
import urllib.error
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import websocket
from safetensors.torch import load_file

from scripts import comfyui, on_tiny

TINY = "mochi-video-tiny"
PROMPT = "a red circle moving right on a black background"


class Graph:
    """An API prompt in the making: `add` returns a node's first output, `out(node, 1)` its second."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, class_type: str, **inputs: Any) -> list[Any]:
        node_id = str(len(self.nodes) + 1)
        self.nodes[node_id] = {"class_type": class_type, "inputs": inputs}
        return [node_id, 0]

    @staticmethod
    def out(link: list[Any], index: int) -> list[Any]:
        return [link[0], index]

    def t5(self, name: str = TINY) -> list[Any]:
        return self.add("MochiVideoT5Loader", t5_name=name, dtype="auto")

    def dit(self, name: str = TINY, **options: Any) -> list[Any]:
        defaults = {"dtype": "auto", "attention": "auto", "memory": "auto"}
        return self.add("MochiVideoDiTLoader", dit_name=name, **(defaults | options))

    def vae(self, name: str = TINY) -> list[Any]:
        return self.add("MochiVideoVAELoader", vae_name=name, dtype="auto")

    def text(self, clip: list[Any], text: str, weighting: bool = False) -> list[Any]:
        return self.add("MochiVideoTextEncode", clip=clip, text=text, weighting=weighting)

    def size(self, frames: int = 13, batch_size: int = 1, **options: Any) -> list[Any]:
        defaults = {"preset": "custom", "width": 64, "height": 64, "frames": frames, "seconds": 0.0}
        return self.add("MochiVideoSize", batch_size=batch_size, **(defaults | options))

    def prompts(self, positive: str = PROMPT, negative: str = "") -> tuple[list[Any], list[Any]]:
        clip = self.t5()
        return self.text(clip, positive), self.text(clip, negative)

    def sampler(self, latent: list[Any] | None = None, **options: Any) -> list[Any]:
        """Our sampler with all that it needs, wherever the test has no wish of its own."""
        if "positive" not in options:
            options["positive"], options["negative"] = self.prompts()
        defaults = {"steps": 4, "cfg": 4.0, "seed": 3, "noise_device": "cpu"}
        model = options.pop("model", None) or self.dit()
        return self.add("MochiVideoSampler", model=model, latent=latent or self.size(), **(defaults | options))

    def decode(self, latent: list[Any], **options: Any) -> list[Any]:
        defaults = {"mode": "streaming", "fps": 30.0, "tile_rows": 1, "tile_columns": 1, "tile_overlap": 0}
        vae = options.pop("vae", None) or self.vae()
        return self.add("MochiVideoDecode", vae=vae, latent=latent, **(defaults | options))

    def probe(self, kind: str, link: list[Any], name: str) -> None:
        self.add(f"MochiTestProbe{kind}", **{kind.lower(): link, "name": name})


class RunningHost(comfyui.Host):
    def tensors(self, graph: Graph, *names: str) -> Any:
        """Runs the graph and reads what its probes wrote: one dict of tensors for each name."""
        for name in names:
            (self.output / f"{name}.safetensors").unlink(missing_ok=True)
        self.run(graph.nodes)
        found = [load_file(self.output / f"{name}.safetensors") for name in names]
        return found[0] if len(found) == 1 else found

    def executed(self, prompt: dict[str, Any]) -> list[str]:
        """Runs the API prompt and says which nodes ran, by their kind and in their order; the others were cached."""
        ran: list[str] = []

        def note(kind: str, data: dict[str, Any]) -> None:
            if kind == "executing" and data["node"] is not None:
                ran.append(prompt[data["node"]]["class_type"])

        self.run(prompt, note)
        return ran

    def told(self, socket: websocket.WebSocket) -> Iterator[tuple[str, dict[str, Any]]]:
        """What the host says on its socket, message by message."""
        return comfyui._messages(socket)

    def each_finished(self, socket: websocket.WebSocket, prompt_ids: Iterable[str]) -> Iterator[str]:
        """These queued prompts, each when it has ended, well or not."""
        left = set(prompt_ids)
        for kind, data in self.told(socket) if left else ():
            if kind == "executing" and data["node"] is None and data.get("prompt_id") in left:
                left.remove(data["prompt_id"])
                yield data["prompt_id"]
                if not left:
                    return

    def run_as_page(self, prompt: dict[str, Any], workflow: dict[str, Any]) -> dict[str, Any]:
        """Runs an API prompt with its workflow beside it, as the page posts it; returns the outputs of its nodes."""
        extra = {"extra_pnginfo": {"workflow": workflow}}
        with self.events() as socket:
            body = {"prompt": prompt, "client_id": self.client, "extra_data": extra}
            prompt_id = self.post("/prompt", body)["prompt_id"]
            assert list(self.each_finished(socket, [prompt_id])) == [prompt_id]
        entry = self.get(f"/history/{prompt_id}")[prompt_id]
        assert entry["status"]["status_str"] == "success", entry["status"]
        return entry["outputs"]

    def answer(self, body: Any) -> tuple[int, Any]:
        """What the host answers to a body posted to `/prompt`: the status, and the content if it is JSON."""
        try:
            return 200, self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            content = error.read()
            return error.code, json.loads(content) if content.startswith(b"{") else content.decode()

    @property
    def memory(self) -> int:
        """Bytes of memory that the host's process holds."""
        assert self._process is not None, "the host runs"
        return psutil.Process(self._process.pid).memory_info().rss

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def models(self) -> Path:
        return self.base / "models"


def workflow(name: str) -> dict[str, Any]:
    """One of the pack's API prompts."""
    return on_tiny.read(name)


def found_inside(script: str) -> dict[str, Any]:
    """What a script found that runs inside the host's own process."""
    path = Path(__file__).parent / script
    done = subprocess.run([sys.executable, str(path)], cwd=comfyui.path(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    return json.loads(line.removeprefix("FOUND"))
