"""The nodes' public interface, frozen: workflow files depend on it.

After a wanted change: `UPDATE_GOLDENS=1 pytest tests/host/test_object_info.py --import-mode=importlib`.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness import RunningHost

from scripts import comfyui

GOLDEN = Path(__file__).parent / "object_info.json"
KEPT = (
    "category",
    "deprecated",
    "description",
    "display_name",
    "experimental",
    "input",
    "input_order",
    "name",
    "output",
    "output_is_list",
    "output_name",
    "output_node",
    "output_tooltips",
)


FILES = (".safetensors", ".gguf", ".json", ".model", "/")


def our_nodes(host: RunningHost) -> dict[str, Any]:
    """Our nodes' descriptions, without the files that other tests put into the host's folders."""
    found = {name: info for name, info in host.get("/object_info").items() if name.startswith("MochiVideo")}
    for info in found.values():
        for _, more in (one for group in ("required", "optional") for one in info["input"].get(group, {}).values()):
            if "options" in more:
                more["options"] = [option for option in more["options"] if not option.endswith(FILES)]
    return {name: {key: found[name][key] for key in KEPT} for name in sorted(found)}


def test_object_info_of_our_nodes_is_the_golden(host: RunningHost) -> None:
    if host.get("/system_stats")["system"]["comfyui_version"] != comfyui.VERSION:
        pytest.skip(f"the golden was taken on ComfyUI {comfyui.VERSION}")
    actual = our_nodes(host)
    if os.environ.get("UPDATE_GOLDENS"):
        GOLDEN.write_text(json.dumps(actual, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert actual == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_every_input_and_output_explains_itself_and_a_beginner_sees_at_most_eight(host: RunningHost) -> None:
    for name, info in our_nodes(host).items():
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for input_name, (_, options) in inputs.items():
            assert options.get("tooltip"), f"{name}.{input_name}"
        assert all(info["output_tooltips"]), name
        visible = [key for key, (_, options) in inputs.items() if not options.get("advanced")]
        assert len(visible) <= 8, f"{name} shows {visible}"


def test_ids_and_names_of_inputs_are_those_of_the_golden_on_any_host(host: RunningHost) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    actual = our_nodes(host)
    assert actual.keys() == golden.keys()
    for name, info in golden.items():
        assert actual[name]["input_order"] == info["input_order"]
        assert actual[name]["output"] == info["output"]
