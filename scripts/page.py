"""The host's page as a person uses it: opened, dropped upon, queued from, looked at."""

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from scripts import comfyui

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
)
SECONDS = 60
# What the host's own page reports of itself on a machine without the internet.
NOT_OURS = (
    "favicon",
    "Failed to load resource",
    "net::ERR_",
    "api.comfy.org",
    "Failed to fetch",
    "firebase",
    # the frontend's own: a setting that is read before it is known, a subgraph being opened, its own haste at the start
    "at Proxy.set",
    "event listeners for graph that was never set up",
    "graph accessed before initialization",
)
WORKFLOWS = comfyui.REPO / "workflows"
TINY = WORKFLOWS / "text_to_video_tiny.json"
SHOTS = comfyui.REPO / ".cache" / "shots"


def chromium() -> str | None:
    """Debian's browser, or the one that CHROMIUM names."""
    named = os.environ.get("CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        yield running
        running.close()


class Canvas:
    """One tab with the host's page in it. `errors` is what its console complained of."""

    def __init__(self, browser: Browser, host: comfyui.Host, *, vue: bool = False, locale: str = "en"):
        self.host, self.errors = host, list[str]()
        settings = {
            "Comfy.TutorialCompleted": True,
            "Comfy.VueNodes.Enabled": vue,
            "Comfy.Locale": locale,
        }
        host.post("/settings", settings)
        host.post("/free", {"free_memory": True})  # what another tab has run is run again
        self.context = browser.new_context(
            viewport={"width": 1600, "height": 1000},
            accept_downloads=True,
            permissions=["clipboard-read", "clipboard-write"],
        )
        self.context.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(SECONDS * 1000)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self._note(f"{error} {error.stack or ''}"))
        self.open()

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._note(message.text)

    def _note(self, error: str) -> None:
        if not any(words in error for words in NOT_OURS):
            self.errors.append(error)

    def open(self) -> None:
        self.page.goto(f"http://127.0.0.1:{self.host.port}/")
        self.ready()

    def reload(self) -> None:
        self.page.reload()
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_function(
            "() => Boolean(window.app?.extensionManager && window.LiteGraph?.registered_node_types?.MochiVideoSize)"
        )
        # The page restores its last workflow a moment later.
        # Newer frontends complain of whoever asks for the graph before there is one.
        self.page.wait_for_function(
            "() => window.app.vueAppReady !== false && window.app.isGraphReady !== false && Boolean(window.app.graph)"
        )
        self.page.wait_for_timeout(1000)

    def close(self) -> None:
        self.context.close()

    # Files

    def drop(self, name: str, content: bytes, kind: str) -> None:
        """Drops a file on the canvas."""
        self.page.evaluate(
            """([name, content, kind]) => {
                const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))
                const data = new DataTransfer()
                data.items.add(new File([bytes], name, { type: kind }))
                const at = { dataTransfer: data, bubbles: true, cancelable: true, clientX: 700, clientY: 900 }
                document.dispatchEvent(new DragEvent('dragover', at))
                document.dispatchEvent(new DragEvent('drop', at))
            }""",
            [name, base64.b64encode(content).decode(), kind],
        )

    def drop_workflow(self, path: Path) -> None:
        """Drops a workflow file and waits for its nodes."""
        nodes = len(json.loads(path.read_text(encoding="utf-8"))["nodes"])
        self.clear()
        self.drop(path.name, path.read_bytes(), "application/json")
        self.page.wait_for_function("count => window.app.graph._nodes.length === count", arg=nodes)
        self.page.wait_for_timeout(500)

    def clear(self) -> None:
        self.page.evaluate("window.app.graph.clear()")

    # The graph

    def graph(self) -> dict[str, Any]:
        return json.loads(self.page.evaluate("JSON.stringify(window.app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """What the page would post."""
        return self.page.evaluate("window.app.graphToPrompt().then((queued) => queued.output)")

    def node(self, kind: str) -> int:
        """The id of the first node of a type."""
        return self.page.evaluate("kind => window.app.graph._nodes.find((node) => node.type === kind).id", kind)

    def set(self, kind: str, widget: str, value: Any) -> None:
        """As if the user had typed it: the value, then what follows from it."""
        self.page.evaluate(
            """([kind, name, value]) => {
                const node = window.app.graph._nodes.find((node) => node.type === kind)
                const widget = node.widgets.find((widget) => widget.name === name)
                widget.value = value
                widget.callback?.(value, window.app.canvas, node)
            }""",
            [kind, widget, value],
        )

    def value(self, kind: str, widget: str) -> Any:
        return self.page.evaluate(
            """([kind, name]) => window.app.graph._nodes.find((node) => node.type === kind)
                .widgets.find((widget) => widget.name === name).value""",
            [kind, widget],
        )

    def missing(self) -> list[str]:
        """Types of nodes that the host does not know."""
        return self.page.evaluate(
            "window.app.graph._nodes.filter((n) => !window.LiteGraph.registered_node_types[n.type]).map((n) => n.type)"
        )

    def changed(self) -> None:
        """Tells the page that an edit is done, as letting go of the mouse does: from here it can be undone."""
        self.page.evaluate("window.app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
        self.page.wait_for_timeout(800)  # it keeps drafts for a reload a little later

    def command(self, name: str) -> None:
        self.page.evaluate("name => window.app.extensionManager.command.execute(name)", name)

    def wait_for_value(self, kind: str, widget: str, value: Any) -> None:
        self.page.wait_for_function(
            """([kind, name, value]) => window.app.graph._nodes.find((node) => node.type === kind)
                ?.widgets.find((widget) => widget.name === name).value === value""",
            arg=[kind, widget, value],
        )

    # Running

    def run(self, timeout: float = SECONDS * 2) -> None:
        """Queues the graph and waits until it has run. Raises when it failed."""
        self.queue()
        self.wait_for_end(timeout)

    def queue(self) -> None:
        self.note_end()
        self.page.evaluate("() => { window.app.queuePrompt(0) }")

    def note_end(self) -> None:
        """From here the page remembers how a run ended and how far it had come."""
        self.page.evaluate(
            """() => {
                window.mochiEnd = undefined
                window.mochiProgress = 0
                for (const name of ['execution_success', 'execution_error', 'execution_interrupted']) {
                    window.app.api.addEventListener(name, (event) => { window.mochiEnd = [name, event.detail] })
                }
                window.app.api.addEventListener('progress', ({ detail }) => { window.mochiProgress = detail.value })
            }"""
        )

    def progress(self) -> float:
        """Steps that the page was told of."""
        return self.page.evaluate("window.mochiProgress")

    @contextmanager
    def saved(self) -> Iterator[list[Path]]:
        """The videos that the block adds to the host's output folder."""
        with self._new_files(self.host.output) as files:
            yield files

    @contextmanager
    def decoded(self) -> Iterator[list[Path]]:
        """The files that the block gives to the player."""
        with self._new_files(self.host.base / "temp") as files:
            yield files

    @contextmanager
    def _new_files(self, folder: Path) -> Iterator[list[Path]]:
        before, files = set(folder.rglob("*.mp4")), list[Path]()
        yield files
        files += sorted(set(folder.rglob("*.mp4")) - before)

    def wait_for_end(self, timeout: float = SECONDS * 2) -> None:
        self.page.wait_for_function("window.mochiEnd !== undefined", timeout=timeout * 1000)
        name, detail = self.page.evaluate("window.mochiEnd")
        assert name == "execution_success", detail
        self.page.wait_for_timeout(300)

    # Looking

    @staticmethod
    def pixels(values: list[int], side: int = 64) -> np.ndarray:
        """What a page read of a square picture, as `H W 3`."""
        return np.array(values).reshape(side, side, 4)[..., :3]

    def look_at(self, kinds: list[str] | None = None) -> None:
        """Moves the view to nodes of these types, or to the whole graph."""
        self.page.evaluate(
            """(kinds) => {
                const { graph, canvas } = window.app
                const nodes = graph._nodes.filter((node) => !kinds || kinds.includes(node.type))
                const edges = [...nodes.map((node) => [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30])]
                if (!kinds) edges.push(...graph._groups.map((one) => [...one.pos, ...one.size]))
                const left = Math.min(...edges.map((e) => e[0])), top = Math.min(...edges.map((e) => e[1]))
                const right = Math.max(...edges.map((e) => e[0] + e[2]))
                const bottom = Math.max(...edges.map((e) => e[1] + e[3]))
                const [width, height] = [canvas.canvas.clientWidth - 160, canvas.canvas.clientHeight - 160]
                const scale = Math.min(width / (right - left), height / (bottom - top), 1.5)
                canvas.ds.scale = scale
                canvas.ds.offset[0] = (80 + (width - (right - left) * scale) / 2) / scale - left
                canvas.ds.offset[1] = (110 + (height - (bottom - top) * scale) / 2) / scale - top
                canvas.setDirty(true, true)
            }""",
            kinds,
        )
        self.page.wait_for_timeout(400)

    def shot_of(self, kind: str) -> bytes:
        """A picture of the first node of a type, cut out of the page."""
        self.look_at([kind])
        left, top, width, height = self.page.evaluate(
            """(kind) => {
                const { graph, canvas } = window.app
                const node = graph._nodes.find((one) => one.type === kind)
                const { scale, offset } = canvas.ds
                const edge = canvas.canvas.getBoundingClientRect()
                const at = [node.pos[0] + offset[0], node.pos[1] - 30 + offset[1]].map((value) => value * scale)
                return [edge.left + at[0], edge.top + at[1], node.size[0] * scale, (node.size[1] + 30) * scale]
            }""",
            kind,
        )
        margin = 12
        box = {"x": left - margin, "y": top - margin, "width": width + 2 * margin, "height": height + 2 * margin}
        return self.page.screenshot(clip=box)  # pyright: ignore[reportArgumentType]

    def shot(self, name: str) -> Path:
        """A screenshot, kept to be looked at."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path
