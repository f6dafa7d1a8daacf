"""The workflows that come with the pack: in order to look at, accepted by the host, and each really runs."""

import json
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import av
import pytest
from harness import TINY, RunningHost, workflow

from mochi_core.latents_file import read_latents
from scripts import on_tiny, workflows

FILES = workflows.graph_files()
NAMES = [path.stem for path in FILES]
TITLE_HEIGHT = 30
# Inputs whose choices are files: what there is differs from machine to machine.
FILE_INPUTS = ("t5_name", "dit_name", "vae_name", "folder", "file", "latent", *on_tiny.LORA_INPUTS)
FRAMES, SIDE = on_tiny.QUICK["frames"], on_tiny.SIDE


def graph(name: str) -> dict[str, Any]:
    return json.loads((workflows.GRAPHS / f"{name}.json").read_text(encoding="utf-8"))


def quick(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt on the embedded checkpoint."""
    return on_tiny.prompt(prompt, **on_tiny.QUICK)


def of_kind(prompt: dict[str, Any], kind: str) -> list[str]:
    return [key for key, node in prompt.items() if node["class_type"] == kind]


@pytest.fixture(scope="module")
def input_files(host: RunningHost) -> dict[str, Path]:
    """What the workflows read, under the names they have for it."""
    return on_tiny.put_inputs(host, **on_tiny.QUICK)


def of_kind_value(prompt: dict[str, Any], kind: str, name: str) -> Any:
    (key,) = of_kind(prompt, kind)
    return prompt[key]["inputs"][name]


# The files


def test_every_graph_has_its_api_prompt_and_the_other_way_round() -> None:
    assert workflows.stale() == []
    assert "text_to_video" in NAMES and len(NAMES) == len(set(NAMES)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_has_a_picture(name: str) -> None:
    assert (workflows.GRAPHS / f"{name}.jpg").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_says_what_it_is_and_what_to_change(name: str) -> None:
    nodes = graph(name)["nodes"]
    texts = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    titles = [node["title"] for node in nodes if node["type"] == "MarkdownNote"]
    assert titles[0] == "Start here" and any("costs" in title for title in titles[1:])
    assert texts[0].startswith("## ") and "Run" in " ".join(texts)
    for node in nodes:  # every file is named with its folder
        for model in node["properties"].get("models", []):
            assert model["name"] in texts[0] and f"models/{model['directory']}" in texts[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_saves_what_it_makes_under_its_name(name: str) -> None:
    prompt = workflow(name)
    prefixes = [node["inputs"]["filename_prefix"] for node in prompt.values() if "filename_prefix" in node["inputs"]]
    if name == "latents_save":
        assert prefixes == ["latents/mochi_half", "latents/mochi_done"]
        return
    assert prefixes == [f"video/mochi_{name}"]
    (save,) = of_kind(prompt, "SaveVideo")
    assert prompt[save]["inputs"]["format"] == "mp4" and prompt[save]["inputs"]["codec"] == "h264"


@pytest.mark.parametrize("name", NAMES)
def test_nodes_lie_side_by_side_and_in_groups(name: str) -> None:
    found = graph(name)
    boxes = {node["id"]: box(node) for node in found["nodes"]}
    for one, other in combinations(boxes, 2):
        assert not overlap(boxes[one], boxes[other]), (one, other)
    groups = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in found["groups"])]
    for one, other in combinations(groups, 2):
        assert not overlap(one, other)
    assert [group["title"][0] for group in sorted(found["groups"], key=lambda g: g["title"])] == [
        str(number) for number in range(1, len(groups) + 1)
    ]
    for node in found["nodes"]:
        homes = [group for group in groups if inside(boxes[node["id"]], group)]
        touched = [group for group in groups if overlap(boxes[node["id"]], group)]
        assert len(homes) == len(touched) == (0 if node["type"] == "MarkdownNote" else 1), node["type"]


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def inside(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return other[0] <= one[0] and other[1] <= one[1] and one[2] <= other[2] and one[3] <= other[3]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_the_page_offers_is_the_one_that_is_chosen(host: RunningHost, name: str) -> None:
    folders = host.get("/models")
    for node in (node for node in graph(name)["nodes"] if node["type"] not in workflows.NOTES):
        values = [value for key, value in workflows.widget_values(node).items() if key in FILE_INPUTS[:3]]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == [value for value in values if value != TINY], node["type"]
        for model in models:
            assert model["directory"] in folders
            assert model["url"].startswith("https://huggingface.co/") and "/resolve/" in model["url"]
            assert model["url"].endswith(".safetensors") and model["name"].endswith(".safetensors")


# The host


@pytest.mark.parametrize("name", NAMES)
def test_the_host_knows_every_node_input_and_choice(host: RunningHost, name: str) -> None:
    for key, node in workflow(name).items():
        kind = node["class_type"]
        (found,) = host.get(f"/object_info/{kind}").values()
        known = {**found["input"].get("required", {}), **found["input"].get("optional", {})}
        newer = set(workflows.NEWER_INPUTS.get(kind, {})) - set(known)
        given = {name_: value for name_, value in node["inputs"].items() if name_ not in newer}
        assert set(found["input"].get("required", {})) <= set(given) <= set(known), (key, kind)
        for name_, value in given.items():
            kind_of_input, details = [*known[name_], {}][:2]
            options = kind_of_input if isinstance(kind_of_input, list) else details.get("options")
            if options is not None and name_ not in FILE_INPUTS and not isinstance(value, list):
                # newer hosts describe a choice that brings inputs of its own
                assert value in [o["key"] if isinstance(o, dict) else o for o in options], (key, kind, name_)


def test_titles_are_the_host_s(host: RunningHost) -> None:
    for kind, title in {**workflows.our_titles(), **workflows.HOST_TITLES}.items():
        assert host.get(f"/object_info/{kind}")[kind]["display_name"] == title


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_tiny")])
def test_without_the_files_the_host_names_each_and_its_folder_and_nothing_else(host: RunningHost, name: str) -> None:
    prompt = workflow(name)
    for node in prompt.values():  # of files that others may have put there
        for key in set(on_tiny.LORA_INPUTS) & set(node["inputs"]):
            if node["inputs"][key] != "none":
                node["inputs"][key] = "not_there.safetensors"
        if node["class_type"] in ("LoadVideo", "LoadLatent"):
            key = "file" if node["class_type"] == "LoadVideo" else "latent"
            node["inputs"][key] = f"not_there_{node['inputs'][key]}"
    status, answer = host.answer({"prompt": prompt, "client_id": host.client})
    assert status == 400
    wrong = {key: answer["node_errors"][key]["errors"] for key in answer["node_errors"]}
    for key, node in prompt.items():
        asked = [name for name in FILE_INPUTS if node["inputs"].get(name, "none") != "none"]
        said = " ".join(error["details"] for error in wrong.get(key, []))
        if not asked or isinstance(node["inputs"][asked[0]], list):
            assert not wrong.get(key), said
            continue
        assert node["inputs"][asked[0]] in said
        if node["class_type"].startswith("MochiVideo"):
            assert "models/" in said
    for node in graph(name)["nodes"]:
        for model in node["properties"].get("models", []):
            said = " ".join(error["details"] for error in wrong[str(node["id"])])
            assert model["name"] in said and f"models/{model['directory']}" in said and model["url"] in said


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_on_the_tiny_model_and_its_files_open(
    host: RunningHost, input_files: dict[str, Path], name: str
) -> None:
    prompt = quick(workflow(name))
    saved = host.saved(host.run(prompt))
    made = [path for path in saved if host.output in path.parents]
    if name == "latents_save":
        made = list(input_files.values())  # it ran for them: the host has them, and makes no others
    expected = len(of_kind(prompt, "SaveVideo")) + len(of_kind(prompt, "SaveLatent"))
    if name == "batch_of_prompts":
        expected = len(of_kind_value(prompt, "MochiVideoPrompts", "prompts").splitlines())
    assert len(made) == len(set(made)) == expected > 0
    for path in made:
        if path.suffix == ".latent":
            assert read_latents(path).shape == (1, 12, 1 + (FRAMES - 1) // 6, SIDE // 8, SIDE // 8)
            continue
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            is_edited = name == "video_to_video"
            assert len(frames) == (1 + (on_tiny.VIDEO_FRAMES - 1) // 6 * 6 if is_edited else FRAMES)
            assert stream.average_rate == (on_tiny.VIDEO_FPS if is_edited else 30)
        is_pair = name == "train_lora_tiny"
        assert frames[0].shape == (SIDE, 2 * SIDE if is_pair else SIDE, 3)
        assert path.name.startswith(f"mochi_{name}_")


def test_a_batch_of_prompts_makes_other_videos_of_other_prompts(
    host: RunningHost, input_files: dict[str, Path]
) -> None:
    prompt = quick(workflow("batch_of_prompts"))
    (prompts,) = of_kind(prompt, "MochiVideoPrompts")
    prompt[prompts]["inputs"].update(prompts="a red circle on a black background\n\na blue square", seeds_per_prompt=2)
    saved = host.saved(host.run(prompt))
    assert len({path.read_bytes() for path in saved}) == len(saved) == 4


def test_saving_and_resuming_changes_nothing(host: RunningHost, input_files: dict[str, Path]) -> None:
    whole = quick(workflow("latents_save"))
    (sigmas,), (split,) = of_kind(whole, "MochiVideoSigmas"), of_kind(whole, "SplitSigmas")
    first, second = sorted(
        of_kind(whole, "SamplerCustomAdvanced"), key=lambda key: whole[key]["inputs"]["sigmas"] == [split, 1]
    )
    whole[first]["inputs"]["sigmas"] = [sigmas, 0]  # all steps
    (save,) = (key for key in of_kind(whole, "SaveLatent") if whole[key]["inputs"]["samples"] == [first, 0])
    whole[save]["inputs"]["filename_prefix"] = "latents/mochi_whole"
    (cut,) = (key for key in of_kind(whole, "SaveLatent") if key != save)
    del whole[second], whole[cut]
    (uninterrupted,) = (read_latents(path) for path in host.saved(host.run(whole)))

    resumed = quick(workflow("latents_resume"))
    (decode,), (save,) = of_kind(resumed, "MochiVideoDecode"), of_kind(resumed, "SaveVideo")
    resumed[save] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": resumed[decode]["inputs"]["latent"], "filename_prefix": "latents/mochi_resumed"},
    }
    del resumed[decode]
    (after_resuming,) = (read_latents(path) for path in host.saved(host.run(resumed)))

    both_halves = read_latents(input_files["mochi_done"])
    assert (after_resuming - uninterrupted).abs().max() <= 1e-4
    assert (both_halves - uninterrupted).abs().max() <= 1e-4
    assert (read_latents(input_files["mochi_half"]) - uninterrupted).abs().max() > 0.1, "there was something left to do"


# From graphs to API prompts


def node(node_id: int, kind: str, inputs: list[dict[str, Any]] = [], values: Any = None, **more: Any) -> dict[str, Any]:
    return {"id": node_id, "type": kind, "inputs": inputs, "widgets_values": values, "title": kind, "mode": 0, **more}


def slot(name: str, kind: str, link: int | None = None, widget: bool = False) -> dict[str, Any]:
    return {"name": name, "type": kind, "link": link, **({"widget": {"name": name}} if widget else {})}


SEEDED = [slot("seed", "INT", widget=True), slot("sampler", "COMBO", widget=True)]


def test_what_is_below_a_seed_is_no_input() -> None:
    assert workflows.widget_values(node(1, "A", SEEDED, [7, "fixed", "euler"])) == {"seed": 7, "sampler": "euler"}
    # a choice of that name is a value when nothing is left over
    assert workflows.widget_values(node(1, "A", SEEDED, [7, "fixed"])) == {"seed": 7, "sampler": "fixed"}


def test_a_button_is_no_value() -> None:
    file = [slot("file", "COMBO", widget=True), slot("upload", "IMAGEUPLOAD", widget=True)]
    assert workflows.widget_values(node(1, "A", file, ["a.mp4", "image"])) == {"file": "a.mp4"}


@pytest.mark.parametrize("values", [[7], [7, "fixed", "euler", "more"], []])
def test_values_that_do_not_fit_are_an_error_that_names_the_node(values: list[Any]) -> None:
    with pytest.raises(workflows.WorkflowError, match=r"node 1 \(A\)"):
        workflows.widget_values(node(1, "A", SEEDED, values))


@pytest.fixture
def chain() -> Iterator[dict[str, Any]]:
    """Source -> middle -> end."""
    yield {
        "nodes": [
            node(1, "Source"),
            node(2, "Middle", [slot("other", "IMAGE"), slot("latent", "LATENT", 1)]),
            node(3, "End", [slot("latent", "LATENT", 2), slot("seed", "INT", 3, widget=True)], [5, "fixed"]),
            node(4, "MarkdownNote", values=["text"]),
        ],
        "links": [[1, 1, 1, 2, 1, "LATENT"], [2, 2, 0, 3, 0, "LATENT"], [3, 1, 0, 3, 1, "INT"]],
    }


def test_links_replace_widgets_and_notes_are_left_out(chain: dict[str, Any]) -> None:
    prompt = workflows.api_prompt(chain)
    assert list(prompt) == ["1", "2", "3"]
    assert prompt["3"] == {
        "class_type": "End",
        "inputs": {"latent": ["2", 0], "seed": ["1", 0]},
        "_meta": {"title": "End"},
    }


def test_a_bypassed_node_and_a_reroute_hand_on_and_a_muted_one_does_not(chain: dict[str, Any]) -> None:
    middle = chain["nodes"][1]
    middle["mode"] = workflows.BYPASSED
    assert workflows.api_prompt(chain)["3"]["inputs"]["latent"] == ["1", 1]
    middle["mode"] = workflows.MUTED
    assert "latent" not in workflows.api_prompt(chain)["3"]["inputs"]
    middle.update(mode=0, type="Reroute", inputs=[slot("", "*", 1)])
    assert workflows.api_prompt(chain)["3"]["inputs"]["latent"] == ["1", 1]
    assert "2" not in workflows.api_prompt(chain)


def test_what_cannot_be_translated_is_an_error(chain: dict[str, Any], tmp_path: Path) -> None:
    chain["nodes"][0]["type"] = "PrimitiveNode"
    with pytest.raises(workflows.WorkflowError, match="primitive"):
        workflows.api_prompt(chain)
    for text, said in {"{": "not JSON", "{}": "no graph"}.items():
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(workflows.WorkflowError, match=said):
            workflows.read_graph(tmp_path / "broken.json")


def test_what_is_stale_is_listed_and_written_anew(tmp_path: Path) -> None:
    shutil.copy(workflows.GRAPHS / "text_to_video_tiny.json", tmp_path / "one.json")
    found = graph("text_to_video_tiny")
    found["nodes"][0]["properties"]["ver"] = "0.0.1"
    (tmp_path / "old.json").write_text(json.dumps(found))
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "gone.json").write_text("{}")
    said = workflows.stale(tmp_path)
    assert len(said) == 3 and "'0.0.1'" in said[0] and "api/one.json" in said[1] and "api/gone.json" in said[2]
    (tmp_path / "api" / "gone.json").unlink()
    workflows.write(tmp_path)
    assert workflows.stale(tmp_path) == []
