"""A workflow file is dropped, Run pressed, the clip seen to move; the video plays, and brings the graph back."""

import json
import re

import av
from playwright.sync_api import expect

from scripts.page import TINY, Canvas

PREVIEW = ".mochi-video-preview canvas"
PLAYER = ".mochi-video-player"
LOOKS = 40
PAINTED = """async (name) => {
    await new Promise((done) => setTimeout(done, 50))
    const canvas = Object.assign(document.createElement('canvas'), { width: 64, height: 64 })
    const paint = canvas.getContext('2d')
    paint.drawImage(document.querySelector(name), 0, 0)
    return Array.from(paint.getImageData(0, 0, 64, 64).data)
}"""


def press_run(canvas: Canvas) -> None:
    canvas.note_end()
    canvas.page.get_by_role("button", name="Run", exact=True).first.click()


def shown(graph: dict) -> dict:
    """What a person would call the same graph: its nodes, what they say, and how they are wired."""
    nodes = {node["id"]: (node["type"], node["pos"], node.get("widgets_values")) for node in graph["nodes"]}
    return {"nodes": nodes, "links": sorted(link[:6] for link in graph["links"])}


def test_run_shows_progress_a_moving_preview_and_a_playing_video(canvas: Canvas, vue: bool) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 120)
    canvas.look_at(["MochiVideoSampler", "MochiVideoDecode"])
    preview = canvas.page.locator(PREVIEW)
    expect(preview).to_be_hidden()
    press_run(canvas)

    expect(preview).to_be_visible()
    canvas.page.wait_for_function("name => document.querySelector(name).dataset.picture > 0", arg=PREVIEW)
    assert canvas.page.evaluate("window.mochiEnd === undefined"), "the preview comes while it runs"
    expect(canvas.page.locator(".mochi-video-preview .mochi-video-caption")).to_contain_text("of 120")
    assert canvas.page.evaluate("window.app.api.clientId") and canvas.progress() > 0
    pictures = canvas.page.evaluate(
        """async (name) => {
            const canvas = document.querySelector(name), seen = {}
            const paint = canvas.getContext('2d')
            for (let look = 0; look < 30; look++) {
                const values = paint.getImageData(0, 0, canvas.width, canvas.height).data
                seen[canvas.dataset.picture] = Array.from(values).join()
                await new Promise((done) => setTimeout(done, 50))
            }
            return seen
        }""",
        PREVIEW,
    )
    assert len(pictures) >= 3 and len(set(pictures.values())) >= 3, "it moves"
    canvas.shot(f"running-{'nodes-2' if vue else 'litegraph'}")

    canvas.wait_for_end()
    video = canvas.page.locator(f"{PLAYER} video")
    expect(video).to_be_visible()
    canvas.page.wait_for_function(
        "name => { const v = document.querySelector(name); return !v.paused && v.currentTime > 0.1 }",
        arg=f"{PLAYER} video",
    )
    box = video.bounding_box()
    assert box is not None and min(box["width"], box["height"]) > 80, "large enough to see"
    canvas.shot(f"finished-{'nodes-2' if vue else 'litegraph'}")


def test_the_saved_video_dropped_back_is_the_same_graph(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoTextEncode", "text", 'a "red" circle\nmoving right 🎈 <b>on</b> black')
    canvas.set("MochiVideoSampler", "steps", 4)
    before = canvas.graph()
    with canvas.saved() as files:
        canvas.run()
    (path,) = files
    with av.open(str(path)) as video:
        assert json.loads(video.metadata["workflow"])["nodes"]

    canvas.clear()
    canvas.drop(path.name, path.read_bytes(), "video/mp4")
    canvas.page.wait_for_function("count => window.app.graph._nodes.length === count", arg=len(before["nodes"]))
    assert shown(canvas.graph()) == shown(before)
    assert canvas.missing() == []


def test_the_player_steps_by_frames_with_buttons_and_keys_and_downloads(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 4)
    canvas.run()
    canvas.look_at(["MochiVideoDecode"])
    page, count = canvas.page, canvas.page.locator(".mochi-video-count")
    button = lambda name: page.locator(PLAYER).get_by_role("button", name=name, exact=True)  # noqa: E731
    button("First frame").click()
    expect(count).to_have_text("frame 1 of 19")
    expect(button("Play")).to_be_visible()
    for _ in range(3):
        button("Next frame").click()
    expect(count).to_have_text("frame 4 of 19")
    button("Previous frame").click()
    expect(count).to_have_text("frame 3 of 19")
    button("Last frame").click()
    expect(count).to_have_text("frame 19 of 19")
    button("Next frame").click()
    expect(count).to_have_text("frame 19 of 19")

    page.locator(PLAYER).focus()
    nodes = len(canvas.graph()["nodes"])
    for key, expected in (
        ("Home", 1),
        ("ArrowRight", 2),
        (".", 3),
        (",", 2),
        ("End", 19),
        ("ArrowLeft", 18),
        ("Delete", 18),
    ):
        page.keyboard.press(key)
        expect(count).to_have_text(f"frame {expected} of 19")
    assert len(canvas.graph()["nodes"]) == nodes, "keys pressed in the player are not the canvas's"
    page.keyboard.press("Space")
    expect(button("Pause")).to_be_visible()
    page.keyboard.press("k")
    expect(button("Play")).to_be_visible()
    page.keyboard.press("l")
    expect(button("Loop")).to_have_attribute("aria-pressed", "false")

    with page.expect_download() as download:
        page.locator(PLAYER).get_by_role("link", name="Download").click()
    assert re.fullmatch(r"mochi_video_\w+\.mp4", download.value.suggested_filename)
    with av.open(str(download.value.path())) as video:
        assert sum(1 for _ in video.decode(video=0)) == 19
        assert "workflow" in video.metadata and "prompt" in video.metadata


def test_each_step_of_the_player_shows_its_own_frame(canvas: Canvas) -> None:
    """The picture on show is the very frame of the file that the number says."""
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 8)
    with canvas.decoded() as clips:
        canvas.run()
    (path,) = clips
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    canvas.look_at(["MochiVideoDecode"])
    canvas.page.locator(PLAYER).focus()
    canvas.page.keyboard.press("Home")
    for index in range(len(frames)):
        if index:
            canvas.page.keyboard.press("ArrowRight")
        for _ in range(LOOKS):  # a browser paints a little after it has found a frame
            picture = canvas.pixels(canvas.page.evaluate(PAINTED, f"{PLAYER} video"))
            errors = [abs(frame.astype(int) - picture).mean() for frame in frames]
            nearest = min(range(len(frames)), key=lambda other: errors[other])
            if nearest == index:
                break
        assert nearest == index, errors


def test_a_batch_is_played_clip_by_clip_and_saved_as_so_many_files(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 4)
    canvas.set("MochiVideoSize", "batch_size", 2)
    with canvas.saved() as files:
        canvas.run()
    assert len(files) == 2
    which = canvas.page.locator(PLAYER).get_by_role("combobox", name="Clip")
    first = canvas.page.locator(f"{PLAYER} video").get_attribute("src")
    which.select_option(label="2")
    assert canvas.page.locator(f"{PLAYER} video").get_attribute("src") != first
