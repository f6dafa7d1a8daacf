"""The training is seen while it runs: the curve of its loss, its samples; stopped, it goes on; words are text."""

import re

from playwright.sync_api import expect

from scripts import workflows
from scripts.page import Canvas

TRAIN = workflows.GRAPHS / "train_lora_tiny.json"
PANEL = ".mochi-video-training"
CURVE = f"{PANEL} .mochi-video-line-raw"
VIDEO = f"{PANEL} video"
STATE = f"{PANEL} [role=status]"
REPORT = ".mochi-video-report"


def short(canvas: Canvas, name: str, steps: int, sample_every: int) -> None:
    """The workflow with fewer steps, under a name of its own."""
    canvas.drop_workflow(TRAIN)
    for widget, value in {"name": name, "steps": steps, "sample_every": sample_every, "sample_steps": 4}.items():
        canvas.set("MochiVideoTrainLora", widget, value)


def points(canvas: Canvas) -> int:
    return len((canvas.page.locator(CURVE).get_attribute("points") or "").split())


def test_the_curve_and_the_samples_are_seen_while_it_trains(canvas: Canvas, vue: bool) -> None:
    short(canvas, f"seen-{vue}", 60, 20)
    canvas.look_at(["MochiVideoPrepareDataset", "MochiVideoTrainLora"])
    expect(canvas.page.locator(STATE)).to_contain_text("appear here while it trains")
    canvas.queue()
    expect(canvas.page.locator(REPORT)).to_contain_text(re.compile("20 (prepared|unchanged)"), timeout=60_000)
    canvas.page.wait_for_function(
        "name => (document.querySelector(name)?.getAttribute('points') ?? '').split(' ').length > 4", arg=CURVE
    )
    assert canvas.page.evaluate("window.mochiEnd === undefined"), "it comes while it runs"
    expect(canvas.page.locator(STATE)).to_contain_text("Training.")
    expect(canvas.page.locator(f"{PANEL} .mochi-video-facts")).to_contain_text(
        re.compile(r"step \d+ of 60, loss \d\.\d+, .* a step, .* left")
    )
    canvas.page.wait_for_function(
        "name => { const v = document.querySelector(name); return v && !v.paused && v.currentTime > 0.05 }", arg=VIDEO
    )
    assert canvas.page.evaluate("window.mochiEnd === undefined"), "a sample comes while it runs"
    canvas.shot(f"training-{'nodes-2' if vue else 'litegraph'}")

    canvas.wait_for_end()
    expect(canvas.page.locator(STATE)).to_contain_text(f"loras/seen-{vue}.safetensors")
    assert points(canvas) == 60
    box = canvas.page.locator(CURVE).bounding_box()
    assert box is not None and box["width"] > 100 and box["height"] > 20, "large enough to see"
    samples = canvas.page.get_by_role("combobox", name="Samples")
    newest = canvas.page.locator(VIDEO).get_attribute("src")
    assert newest and "step_000060" in newest
    samples.select_option(label="sample at step 20")
    expect(canvas.page.locator(VIDEO)).to_have_attribute("src", re.compile("step_000020"))
    canvas.shot(f"trained-{'nodes-2' if vue else 'litegraph'}")


def test_what_was_stopped_says_so_and_goes_on(canvas: Canvas, vue: bool) -> None:
    short(canvas, f"stopped-{vue}", 60, 0)
    canvas.queue()
    canvas.page.wait_for_function(
        "name => (document.querySelector(name)?.getAttribute('points') ?? '').split(' ').length > 4", arg=CURVE
    )
    canvas.host.post("/interrupt", {})
    expect(canvas.page.locator(STATE)).to_contain_text(re.compile(r"Stopped after step \d+\. Run again to go on"))
    canvas.page.wait_for_function("window.mochiEnd !== undefined")
    done = points(canvas)
    assert 4 < done < 60
    canvas.run()
    expect(canvas.page.locator(STATE)).to_contain_text("Finished.")
    assert points(canvas) == 60, "the curve is that of the whole training"


def test_the_panel_is_there_again_when_the_workflow_is(canvas: Canvas) -> None:
    """Undoing an edit makes every node anew."""
    short(canvas, "again", 4, 0)
    canvas.run()
    expect(canvas.page.locator(STATE)).to_contain_text("Finished.")
    canvas.changed()
    canvas.set("MochiVideoTrainLora", "rank", 3)
    canvas.changed()
    canvas.command("Comfy.Undo")
    canvas.wait_for_value("MochiVideoTrainLora", "rank", 16)
    expect(canvas.page.locator(STATE)).to_contain_text("Finished.")
    assert points(canvas) == 4


HOSTILE = "<img src=x onerror='window.hacked = true'><script>window.hacked = true</script>"


def test_what_the_server_says_of_a_training_is_text(canvas: Canvas) -> None:
    canvas.drop_workflow(TRAIN)
    train, prepare = canvas.node("MochiVideoTrainLora"), canvas.node("MochiVideoPrepareDataset")
    canvas.page.evaluate(
        """([words, train, prepare]) => {
            const send = (name, detail) => window.app.api.dispatchEvent(new CustomEvent(name, { detail }))
            const file = { filename: words, subfolder: words, step: words }
            const told = { state: 'finished', step: words, steps: 5, loss: words, rate: words, seconds: words,
                lora: words, curve: [[1, 1], words, [words, 2], null], samples: [null, words, file] }
            send('mochi_video.training', { node: String(train), prompt_id: words, ...told })
            send('mochi_video.training', { node: words, prompt_id: words, ...told, curve: words })
            send('executed', { node: String(prepare), prompt_id: words, output: { text: [words] } })
        }""",
        [HOSTILE, train, prepare],
    )
    expect(canvas.page.locator(REPORT)).to_contain_text("onerror")
    expect(canvas.page.locator(STATE)).to_contain_text("onerror")
    canvas.page.wait_for_timeout(300)
    assert canvas.page.evaluate("window.hacked") is None
    canvas.errors.clear()  # the file that does not exist
