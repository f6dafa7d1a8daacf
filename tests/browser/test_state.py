"""What was set stays set: saved, reloaded, undone, copied, and in a subgraph."""

import json

from playwright.sync_api import expect

from scripts.page import TINY, Canvas

PLAYER = ".mochi-video-player"


def test_saving_and_loading_keeps_every_value_and_the_files_know_no_panel(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "seed", 12345678901234)
    canvas.set("MochiVideoSize", "frames", 37)
    graph = canvas.graph()
    prompt = canvas.prompt()
    for node in graph["nodes"]:
        assert "mochi_video" not in str(node.get("widgets_values")) + str(node.get("inputs"))
    assert all("mochi_video" not in name for node in prompt.values() for name in node["inputs"])
    canvas.clear()
    canvas.page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    canvas.page.wait_for_function("count => window.app.graph._nodes.length === count", arg=len(graph["nodes"]))
    assert canvas.prompt() == prompt
    after = {node["id"]: node.get("widgets_values") for node in canvas.graph()["nodes"]}
    assert after == {node["id"]: node.get("widgets_values") for node in graph["nodes"]}


def test_a_reload_of_the_page_brings_the_graph_back_with_its_panels(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSize", "frames", 31)
    prompt = canvas.prompt()
    canvas.changed()
    canvas.reload()
    canvas.page.wait_for_function("() => window.app.graph._nodes.some((node) => node.type === 'MochiVideoSize')")
    assert canvas.prompt() == prompt
    expect(canvas.page.locator(".mochi-video-cost").first).to_contain_text("31 frames")


def test_undo_and_redo_keep_values_and_the_decoded_video(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 4)
    canvas.changed()
    canvas.run()
    expect(canvas.page.locator(f"{PLAYER} video")).to_be_visible()
    canvas.set("MochiVideoSize", "frames", 25)
    canvas.changed()
    canvas.command("Comfy.Undo")
    canvas.wait_for_value("MochiVideoSize", "frames", 19)
    expect(canvas.page.locator(f"{PLAYER} video")).to_be_visible()
    canvas.command("Comfy.Redo")
    canvas.wait_for_value("MochiVideoSize", "frames", 25)
    assert canvas.page.locator(PLAYER).count() == 1, "panels of the graph before are gone"


def test_a_run_is_no_change_of_the_workflow(canvas: Canvas, vue: bool) -> None:
    """Nodes of the least size do not grow when they get something to show: undo takes back what the user did."""
    canvas.drop_workflow(TINY)
    canvas.page.evaluate(
        """() => window.app.graph._nodes.filter((node) => node.type.startsWith('MochiVideo'))
            .forEach((node) => node.setSize(node.computeSize()))"""
    )
    canvas.set("MochiVideoSampler", "steps", 4)
    canvas.changed()
    for frames in (25, 31):
        canvas.set("MochiVideoSize", "frames", frames)
        canvas.changed()
    sizes = {node["id"]: node["size"] for node in canvas.graph()["nodes"] if node["type"].startswith("MochiVideo")}
    canvas.run()
    expect(canvas.page.locator(f"{PLAYER} video")).to_be_visible()
    canvas.changed()
    after = {node["id"]: node["size"] for node in canvas.graph()["nodes"] if node["type"].startswith("MochiVideo")}
    assert after == sizes
    if vue:  # there the host's own Save Video grows, and undo takes that back
        return
    for frames in (25, 19):
        canvas.command("Comfy.Undo")
        canvas.wait_for_value("MochiVideoSize", "frames", frames)
        canvas.changed()
        expect(canvas.page.locator(f"{PLAYER} video")).to_be_visible()


def test_what_one_workflow_makes_is_not_shown_in_another(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 300)
    canvas.queue()
    canvas.page.wait_for_function("() => window.mochiProgress > 0")
    canvas.command("Comfy.NewBlankWorkflow")
    canvas.page.wait_for_function("() => !window.app.graph._nodes.some((node) => node.type === 'MochiVideoSampler')")
    canvas.page.evaluate("graph => window.app.loadGraphData(graph)", json.loads(TINY.read_text(encoding="utf-8")))
    canvas.page.wait_for_function("() => window.app.graph._nodes.some((node) => node.type === 'MochiVideoDecode')")
    canvas.wait_for_end()
    canvas.page.wait_for_timeout(1200)
    expect(canvas.page.locator(".mochi-video-preview canvas")).to_be_hidden()
    expect(canvas.page.locator(f"{PLAYER} video")).to_be_hidden()
    canvas.page.evaluate(
        """() => {
            const { workflow } = window.app.extensionManager
            const own = workflow.openWorkflows.find((one) => one.path.includes('text_to_video_tiny'))
            return window.app.loadGraphData(own.activeState, true, true, own)
        }"""
    )
    expect(canvas.page.locator(f"{PLAYER} video")).to_be_visible()


def test_copied_nodes_have_their_values_and_panels_of_their_own(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSize", "frames", 37)
    canvas.page.evaluate(
        """() => {
            const { graph, canvas } = window.app
            const chosen = graph._nodes.filter((node) => ['MochiVideoSize', 'MochiVideoDecode'].includes(node.type))
            canvas.selectItems(chosen)
            canvas.copyToClipboard()
            canvas.pasteFromClipboard()
        }"""
    )
    canvas.page.wait_for_function(
        "() => window.app.graph._nodes.filter((n) => n.type === 'MochiVideoSize').length === 2"
    )
    frames = canvas.page.evaluate(
        """() => window.app.graph._nodes.filter((n) => n.type === 'MochiVideoSize')
            .map((n) => n.widgets.find((w) => w.name === 'frames').value)"""
    )
    assert frames == [37, 37]
    canvas.look_at()
    expect(canvas.page.locator(".mochi-video-cost")).to_have_count(3)  # two sizes and the sampler
    expect(canvas.page.locator(PLAYER)).to_have_count(2)


def test_in_a_subgraph_previews_and_videos_still_find_their_node(canvas: Canvas, vue: bool) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 40)
    canvas.page.evaluate(
        """() => {
            const { graph, canvas } = window.app
            const inside = graph._nodes.filter((node) => /^MochiVideo(Size|Sampler|Decode)$/.test(node.type))
            const { node } = graph.convertToSubgraph(new Set(inside))
            canvas.openSubgraph(node.subgraph, node)
        }"""
    )
    line = canvas.page.locator(".mochi-video-cost").first
    expect(line).to_contain_text("19 frames")
    # The small model's: its loader has stayed outside.
    expect(line).to_contain_text("sampling 3 MB")
    canvas.queue()
    expect(canvas.page.locator(".mochi-video-preview canvas")).to_be_visible()
    canvas.wait_for_end()
    expect(canvas.page.locator(f"{PLAYER} video")).to_be_visible()
    canvas.shot(f"subgraph-{'nodes-2' if vue else 'litegraph'}")
