"""People who cannot see or use a mouse can use our panels too."""

import json

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from scripts.page import TINY, Canvas


def test_axe_finds_nothing_wrong_with_our_panels(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 4)
    canvas.run()
    canvas.look_at(["MochiVideoSampler", "MochiVideoDecode", "MochiVideoSize"])
    canvas.page.evaluate("document.querySelector('.mochi-video-player video').pause()")
    found = Axe().run(canvas.page, context={"include": [[".mochi-video-panel"]]})
    wrong = [(one["id"], one["help"], [node["html"] for node in one["nodes"]]) for one in found.response["violations"]]
    assert not wrong, json.dumps(wrong, indent=1)
    assert found.response["passes"], "something was looked at"


def test_the_player_is_reached_and_used_by_keyboard_alone(canvas: Canvas) -> None:
    canvas.drop_workflow(TINY)
    canvas.set("MochiVideoSampler", "steps", 4)
    canvas.run()
    canvas.look_at(["MochiVideoDecode"])
    page = canvas.page
    page.locator(".mochi-video-player").focus()
    page.keyboard.press("Home")
    names = []
    for _ in range(9):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    expected = ["Frame", "First frame", "Previous frame", "Play", "Next frame", "Last frame", "Loop", "Download"]
    assert [name for name in names if name in expected] == expected
    page.get_by_role("button", name="Next frame").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".mochi-video-count")).to_have_text("frame 2 of 19")
