"""The size keeps to the grid, the cost line says what it costs, words are text and in the page's language."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from scripts.page import TINY, Canvas

COST = ".mochi-video-cost"


def cost_of(canvas: Canvas, kind: str = "MochiVideoSize"):
    """The line of a node: of the size by itself, or the one of the sampler too."""
    return canvas.page.locator(COST).nth(0 if kind == "MochiVideoSize" else 1)


@pytest.mark.parametrize(("asked", "made"), [(162, 163), (1, 1), (20, 19), (166, 169)])
def test_frames_snap_while_they_are_edited(shared: Canvas, asked: int, made: int) -> None:
    shared.drop_workflow(TINY)
    shared.set("MochiVideoSize", "frames", asked)
    assert shared.value("MochiVideoSize", "frames") == made
    expect(shared.page.locator(COST).first).to_contain_text(f"{made} frames · {made / 30:.1f} s")


def test_presets_fill_the_size_and_an_own_size_is_custom(shared: Canvas) -> None:
    shared.drop_workflow(TINY)
    shared.set("MochiVideoSize", "preset", "848x480 (released)")
    assert [shared.value("MochiVideoSize", name) for name in ("width", "height")] == [848, 480]
    shared.set("MochiVideoSize", "width", 650)
    assert [shared.value("MochiVideoSize", name) for name in ("preset", "width")] == ["custom", 656]


def field(canvas: Canvas, name: str):
    """An input of the size node as Nodes 2.0 shows it."""
    node = canvas.page.locator(f'[data-node-id="{canvas.node("MochiVideoSize")}"]')
    return node.locator(f'input[aria-label="{name}"], [aria-label="{name}"] input').first


def test_in_nodes_2_fields_that_are_typed_into_show_what_the_model_will_make(opened: Callable[..., Canvas]) -> None:
    canvas = opened(vue=True)
    canvas.drop_workflow(TINY)
    canvas.look_at(["MochiVideoSize"])
    for name, typed, made in (("frames", "27", "25"), ("width", "650", "656")):
        field(canvas, name).focus()
        canvas.page.keyboard.press("ControlOrMeta+a")
        canvas.page.keyboard.type(typed)
        canvas.page.keyboard.press("Enter")
        expect(field(canvas, name)).to_have_value(made)
        assert canvas.value("MochiVideoSize", name) == int(made)
    assert canvas.value("MochiVideoSize", "preset") == "custom"


def test_an_edit_of_frames_is_not_overruled_by_seconds(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSize", "seconds", 2.0)
    expect(canvas.page.locator(COST).first).to_contain_text("61 frames")
    canvas.set("MochiVideoSize", "frames", 37)
    canvas.wait_for_value("MochiVideoSize", "seconds", 0)
    expect(canvas.page.locator(COST).first).to_contain_text("37 frames")


def test_the_cost_follows_the_size_the_model_and_the_steps(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    line = canvas.page.locator(COST).first
    expect(line).to_contain_text("64 tokens")
    expect(line).to_have_attribute("data-verdict", "fits")
    canvas.set("MochiVideoSampler", "steps", 4)
    canvas.run()
    expect(line).to_contain_text(re.compile(r"about .* for 4 steps"))
    canvas.set("MochiVideoSampler", "steps", 6)
    expect(line).to_contain_text("for 6 steps")
    # Where there is no such file, it is the released model that is meant.
    canvas.set("MochiVideoDiTLoader", "dit_name", "dit.safetensors")
    canvas.set("MochiVideoSize", "preset", "848x480 (released)")
    canvas.set("MochiVideoSize", "frames", 163)
    expect(line).to_contain_text("44\u202f520 tokens")
    expect(line).to_contain_text("released model: sampling")
    expect(line).to_contain_text("known after a first run")
    canvas.set("MochiVideoSize", "preset", "custom")
    canvas.set("MochiVideoSize", "width", 4096)
    canvas.set("MochiVideoSize", "height", 4096)
    canvas.set("MochiVideoSize", "frames", 1537)
    expect(line).to_have_attribute("data-verdict", "too_large")
    expect(line).to_contain_text("will not fit")
    canvas.set("MochiVideoDiTLoader", "memory", "streamed")
    canvas.set("MochiVideoSize", "preset", "640x368 fast")
    canvas.set("MochiVideoSize", "frames", 37)
    expect(line).to_have_attribute("data-verdict", "streams")


def test_a_host_that_does_not_answer_is_said_and_asked_again(canvas: Canvas) -> None:
    canvas.page.route("**/mochi_video/cost**", lambda route: route.fulfill(status=404, body="not found"))
    canvas.drop_workflow(TINY)
    line = canvas.page.locator(COST).first
    expect(line).to_contain_text("The host does not say what this costs.")
    canvas.page.unroute("**/mochi_video/cost**")
    expect(line).to_contain_text("64 tokens", timeout=20_000)


def test_a_size_that_a_wire_decides_has_no_figure(shared: Canvas) -> None:
    shared.drop_workflow(TINY)
    shared.page.evaluate(
        """() => {
            const { graph } = window.app
            const source = window.LiteGraph.createNode('PrimitiveInt')
            graph.add(source)
            const size = graph._nodes.find((node) => node.type === 'MochiVideoSize')
            source.connect(0, size, size.inputs.findIndex((input) => input.name === 'frames'))
        }"""
    )
    expect(shared.page.locator(COST).first).to_contain_text("The cost is known when the size is.")


HOSTILE = "<img src=x onerror='window.hacked = true'><script>window.hacked = true</script>"


def test_what_the_server_says_is_text(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    sampler, decode = canvas.node("MochiVideoSampler"), canvas.node("MochiVideoDecode")
    canvas.page.evaluate(
        """([words, sampler, decode]) => {
            const send = (name, detail) => window.app.api.dispatchEvent(new CustomEvent(name, { detail }))
            window.app.graph.getNodeById(sampler).title = words
            const from = { node: String(sampler), prompt_id: words }
            send('mochi_video.warning', { ...from, text: words })
            send('mochi_video.preview', { ...from, step: words, steps: words, count: 1, columns: 1,
                width: 1, height: 1, fps: 5, image: 'data:image/svg+xml,' + words })
            send('mochi_video.preview', { ...from, node: words })
            const clip = { filename: words, subfolder: words, type: words, frames: 1, fps: 1, width: 1, height: 1 }
            const output = { mochi_video: [clip, null, words, { ...clip, fps: words }] }
            send('executed', { ...from, node: String(decode), output })
        }""",
        [HOSTILE, sampler, decode],
    )
    expect(canvas.page.get_by_text("onerror").first).to_be_visible()
    canvas.page.wait_for_timeout(300)
    assert canvas.page.evaluate("window.hacked") is None
    source = canvas.page.locator(".mochi-video-player video").get_attribute("src")
    assert source is not None and "<" not in source and "/view?filename=%3Cimg" in source
    canvas.errors.clear()  # the file that does not exist


def test_a_prompt_that_is_cut_is_told_in_a_message(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 2)
    canvas.set("MochiVideoTextEncode", "text", " ".join(f"word{index} <i>{index}</i>" for index in range(400)))
    canvas.run()
    message = canvas.page.locator(".p-toast-message").filter(has_text="longer than 256 tokens")
    expect(message.first).to_be_visible()
    expect(message.first).to_contain_text("Mochi Video: Prompt")


def test_panels_can_be_switched_off(opened: Callable[..., Canvas]) -> None:
    canvas = opened()
    names = ("Preview", "Cost", "Player", "Training", "Warnings")
    canvas.host.post("/settings", {f"MochiVideo.{name}": False for name in names})
    try:
        canvas.reload()
        canvas.drop_workflow(TINY)
        canvas.set("MochiVideoSampler", "steps", 2)
        canvas.run()
        assert canvas.page.locator(".mochi-video-panel").count() == 0
    finally:
        canvas.host.post("/settings", {f"MochiVideo.{name}": True for name in names})


def chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def test_the_page_in_chinese_names_nodes_inputs_and_panels_in_chinese(opened: Callable[..., Canvas], vue: bool) -> None:
    canvas = opened(vue=vue, locale="zh")
    canvas.drop_workflow(TINY)
    expect(canvas.page.locator(COST).first).to_contain_text("19 帧")
    node = canvas.page.evaluate(
        """() => {
            const { title, nodeData } = window.LiteGraph.registered_node_types.MochiVideoSampler
            const made = window.LiteGraph.createNode('MochiVideoSampler')
            return [title ?? nodeData.display_name, made.widgets.find((widget) => widget.name === 'steps').label]
        }"""
    )
    # The frontend of 0.3.75 loses what packs translate: their words are merged before its own, which replace them.
    if canvas.host.get("/system_stats")["system"]["comfyui_version"] != "0.3.75":
        assert all(map(chinese, node)), node
    canvas.look_at()
    canvas.shot(f"chinese-{'nodes-2' if vue else 'litegraph'}")


def test_panels_follow_when_the_language_is_changed(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    line, empty = canvas.page.locator(COST).first, canvas.page.locator(".mochi-video-player .mochi-video-caption")
    expect(line).to_contain_text("19 frames")
    canvas.page.evaluate("window.app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    expect(line).to_contain_text("19 帧")
    assert chinese(empty.inner_text())
    canvas.page.evaluate("window.app.extensionManager.setting.set('Comfy.Locale', 'en')")
    expect(line).to_contain_text("19 frames")
    expect(empty).to_have_text("The video appears here when it is decoded.")
