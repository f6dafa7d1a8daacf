"""Every workflow file, dropped on the canvas, is a graph without a fault that posts the prompt beside it."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

from scripts import workflows
from scripts.page import Canvas

FILES = workflows.graph_files()


def models_of(path: Path) -> list[dict[str, str]]:
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    return [model for node in nodes for model in node["properties"].get("models", [])]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_dropped_workflow_has_all_its_nodes_and_posts_its_prompt(shared: Canvas, path: Path) -> None:
    shared.drop_workflow(path)
    assert shared.missing() == []
    expected = json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))
    posted = shared.prompt()
    for key, node in expected.items():  # older hosts' pages know nothing of them
        newer = set(workflows.NEWER_INPUTS.get(node["class_type"], {})) - set(posted[key]["inputs"])
        node["inputs"] = {name: value for name, value in node["inputs"].items() if name not in newer}
    # Newer hosts have inputs within the choice of a format, which prompts need not have.
    for node in posted.values():
        node["inputs"] = {name: value for name, value in node["inputs"].items() if "." not in name}
    assert posted == expected
    shared.errors[:] = [error for error in shared.errors if "input_video.mp4" not in error]


@pytest.mark.parametrize("name", ["text_to_video", "text_to_video_fastmochi", "video_to_video"])
def test_missing_models_are_named_with_folder_and_address(shared: Canvas, name: str) -> None:
    """By the page when the file is dropped, and by the nodes when the graph is queued all the same."""
    path = workflows.GRAPHS / f"{name}.json"
    shared.drop_workflow(path)
    models = models_of(path)
    assert models
    for model in models:
        expect(shared.page.get_by_text(model["name"]).first).to_be_visible()
    shared.page.keyboard.press("Escape")
    errors = shared.page.evaluate(
        """async () => {
            const { output } = await window.app.graphToPrompt()
            const answer = await window.app.api.fetchApi('/prompt', {
                method: 'POST', body: JSON.stringify({ prompt: output })
            })
            return [answer.status, await answer.text()]
        }"""
    )
    assert errors[0] == 400
    for model in models:
        assert all(model[part] in errors[1] for part in ("name", "directory", "url"))


def test_what_is_wrong_is_shown_on_its_node(shared: Canvas) -> None:
    shared.drop_workflow(workflows.GRAPHS / "text_to_video.json")
    shared.page.keyboard.press("Escape")
    shared.page.evaluate("() => { window.app.queuePrompt(0) }")
    shared.page.wait_for_function("() => Object.keys(window.app.lastNodeErrors ?? {}).length > 0")
    wrong = shared.page.evaluate(
        "() => Object.keys(window.app.lastNodeErrors).map((id) => window.app.graph.getNodeById(id).type).sort()"
    )
    assert wrong == ["MochiVideoDiTLoader", "MochiVideoT5Loader", "MochiVideoVAELoader"]
    expect(shared.page.get_by_text("there is no such file in models/diffusion_models").first).to_be_visible()
    shared.errors[:] = [error for error in shared.errors if "Prompt execution failed" not in error]
