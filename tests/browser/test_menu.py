"""The graph goes out as a prompt, as a curl command and as a Python script; each of them works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.page import TINY, Canvas

PROMPT = "a 'red' \"circle\" $HOME `date` \\n moving right\n</script> 🎈 PROMPT"


def copied(canvas: Canvas, command: str) -> str:
    canvas.page.evaluate("navigator.clipboard.writeText('')")
    canvas.command(f"MochiVideo.{command}")
    canvas.page.wait_for_function("() => navigator.clipboard.readText().then((text) => text !== '')")
    return canvas.page.evaluate("navigator.clipboard.readText()")


@pytest.fixture
def ready(canvas: Canvas) -> Canvas:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 2)
    canvas.set("MochiVideoTextEncode", "text", PROMPT)
    return canvas


def finished(canvas: Canvas, prompt_id: str) -> dict:
    history = canvas.page.evaluate(
        """async (id) => {
            for (;;) {
                const history = await (await fetch('/history/' + id)).json()
                if (history[id]) return history[id]
                await new Promise((done) => setTimeout(done, 100))
            }
        }""",
        prompt_id,
    )
    assert history["status"]["status_str"] == "success"
    return history


def test_the_copied_prompt_is_what_the_page_posts(ready: Canvas) -> None:
    assert json.loads(copied(ready, "CopyPrompt")) == ready.prompt()


def test_the_copied_curl_command_queues_the_graph(ready: Canvas) -> None:
    done = subprocess.run(["bash", "-c", copied(ready, "CopyCurl")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    history = finished(ready, json.loads(done.stdout)["prompt_id"])
    assert PROMPT in [node["inputs"].get("text") for node in history["prompt"][2].values()]
    assert history["prompt"][3]["extra_pnginfo"]["workflow"]["nodes"]


def test_the_copied_script_runs_and_says_what_came_of_it(ready: Canvas, tmp_path: Path) -> None:
    script = tmp_path / "queue_it.py"
    script.write_text(copied(ready, "CopyPython"), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "success" in done.stdout and ".mp4" in done.stdout


def test_the_entries_are_in_the_menus(ready: Canvas) -> None:
    contents = ready.page.evaluate(
        """() => {
            const { canvas, graph } = window.app
            const labels = (entries) => entries.filter(Boolean).flatMap((one) =>
                [one.content, ...(one.submenu?.options ?? []).map((inner) => inner?.content)])
            const ours = graph._nodes.find((node) => node.type === 'MochiVideoSampler')
            return [labels(canvas.getCanvasMenuOptions()), labels(canvas.getNodeMenuOptions(ours))]
        }"""
    )
    for labels in contents:
        assert {"Mochi Video", "Copy as API prompt", "Copy as curl command", "Copy as Python script"} <= set(labels)


def test_without_a_clipboard_there_is_a_text_to_copy_from(ready: Canvas) -> None:
    ready.page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    ready.command("MochiVideo.CopyPrompt")
    area = ready.page.get_by_role("dialog").get_by_role("textbox")
    assert json.loads(area.input_value()) == ready.prompt()
    ready.page.keyboard.press("Escape")
    assert ready.page.locator(".mochi-video-dialog").count() == 0
