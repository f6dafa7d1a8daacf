"""Makes the API prompts in `workflows/api` from the graphs in `workflows`: `python scripts/workflows.py [--check]`.

The graphs are what people edit, in ComfyUI's page; an API prompt is what the page would send for one of them.
"""

import argparse
import ast
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from mochi_core import __version__  # noqa: E402

GRAPHS = REPO / "workflows"
PACK = "mochi-video"
NOTES = ("Note", "MarkdownNote")
MUTED, BYPASSED = 2, 4
# What the page shows below a seed; it belongs to no input.
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
# Widgets that are buttons: the page sends them no value.
BUTTONS = ("IMAGEUPLOAD",)
# What newer hosts ask of their nodes besides; prompts have it, and older hosts leave it alone.
NEWER_INPUTS = {"LoraModelLoader": {"bypass": False}}
# The host's own names for its nodes, where a graph gives none.
HOST_TITLES = {
    "GetVideoComponents": "Get Video Components",
    "LoadVideo": "Load Video",
    "SaveVideo": "Save Video",
}


class WorkflowError(Exception):
    """A graph that no API prompt can be made of; says which node, and why."""


def graph_files(folder: Path = GRAPHS) -> list[Path]:
    return sorted(folder.glob("*.json"))


def read_graph(path: Path) -> dict[str, Any]:
    """The graph of a file. Raises `WorkflowError` when it is none, or not of this version of the pack."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkflowError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(graph, dict) or "nodes" not in graph or "links" not in graph:
        raise WorkflowError(f"{path.name} is no graph: save it in ComfyUI's page, not as an API prompt")
    if graph.get("definitions", {}).get("subgraphs"):
        raise WorkflowError(f"{path.name} has subgraphs: unpack them")
    for node in graph["nodes"]:
        properties = node.get("properties", {})
        if node["type"] in our_titles() and (properties.get("cnr_id"), properties.get("ver")) != (PACK, __version__):
            raise WorkflowError(
                f"{path.name}, {_named(node)}: cnr_id and ver are {properties.get('cnr_id')!r} and "
                f"{properties.get('ver')!r}, not {PACK!r} and {__version__!r}. Run this without --check to set them"
            )
    return graph


@cache
def our_titles() -> dict[str, str]:
    """The display name of each of our nodes, from their schemas as they are written."""
    titles = {}
    for path in (REPO / "nodes").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                given = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
                if "node_id" in given and "display_name" in given:
                    titles[str(given["node_id"])] = str(given["display_name"])
    return titles


def with_version(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph with this pack's name and version in our nodes."""
    for node in graph["nodes"]:
        if node["type"] in our_titles():
            node.setdefault("properties", {}).update(cnr_id=PACK, ver=__version__)
    return graph


def api_prompt(graph: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the page would send for a graph. Raises `WorkflowError` on what this cannot translate."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in graph["links"]}
    titles = our_titles() | HOST_TITLES
    prompt = {}
    for node in sorted(nodes.values(), key=lambda node: node["id"]):
        if node["type"] in (*NOTES, "Reroute") or node.get("mode") in (MUTED, BYPASSED):
            continue
        inputs: dict[str, Any] = dict(NEWER_INPUTS.get(node["type"], {}))
        values = widget_values(node)
        for slot in node.get("inputs", []):
            name = slot["name"]
            if slot.get("link") is not None:
                source = _source(slot["link"], slot["type"], nodes, links)
                if source is not None:
                    inputs[name] = source
            elif name in values:
                inputs[name] = values[name]
        title = node.get("title") or titles.get(node["type"])
        if title is None:
            raise WorkflowError(f"{_named(node)} has no title: give it one in the page, or a name in HOST_TITLES")
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def widget_values(node: dict[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by the name of their input, linked ones too.

    A graph lists values in the order of widgets, and has more of them than inputs: one below each seed.
    """
    slots = [slot for slot in node.get("inputs", []) if "widget" in slot]
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return {slot["name"]: values[slot["widget"]["name"]] for slot in slots if slot["type"] not in BUTTONS}
    rest = list(values)
    found = {}
    for index, slot in enumerate(slots):
        if not rest:
            raise WorkflowError(f"{_named(node)} has no value for {slot['name']}: open and save the graph again")
        value = rest.pop(0)
        if slot["type"] not in BUTTONS:
            found[slot["name"]] = value
        more_than_inputs = len(rest) > len(slots) - index - 1
        if more_than_inputs and slot["type"] in ("INT", "COMBO") and rest[0] in AFTER_GENERATE:
            rest.pop(0)
    if rest:
        raise WorkflowError(f"{_named(node)} has values that belong to no input: {rest}. Open and save the graph again")
    return found


def _source(
    link: int, kind: str, nodes: dict[int, dict[str, Any]], links: dict[int, tuple[int, int]]
) -> list[Any] | None:
    """The node and output that a link comes from, through reroutes and bypassed nodes; None from a muted one."""
    if link not in links:
        raise WorkflowError(f"Link {link} leads from nowhere: open and save the graph again")
    origin, output = links[link]
    node = nodes[origin]
    if node["type"] == "PrimitiveNode":
        raise WorkflowError(f"{_named(node)} is a primitive: set the value in the node itself")
    if node.get("mode") == MUTED:
        return None
    if node["type"] != "Reroute" and node.get("mode") != BYPASSED:
        return [str(origin), output]
    slots = node.get("inputs", [])
    same_place = slots[output : output + 1]
    for slot in slots if node["type"] == "Reroute" else [*same_place, *slots]:
        if node["type"] == "Reroute" or slot["type"] == kind:
            return None if slot.get("link") is None else _source(slot["link"], kind, nodes, links)
    return None


def _named(node: dict[str, Any]) -> str:
    return f"node {node['id']} ({node.get('title') or node['type']})"


def prompt_text(prompt: dict[str, dict[str, Any]]) -> str:
    """JSON with a node on each line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(node, ensure_ascii=False)}" for key, node in prompt.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def stale(folder: Path = GRAPHS) -> list[str]:
    """What is not in step, a line each: API prompts that are missing, other than their graph, or without one."""
    found = []
    for path in graph_files(folder):
        twin = folder / "api" / path.name
        try:
            text = prompt_text(api_prompt(read_graph(path)))
        except WorkflowError as error:
            found.append(str(error))
            continue
        if not twin.exists() or twin.read_text(encoding="utf-8") != text:
            found.append(f"api/{path.name} is not what {path.name} makes")
    graphs = {path.name for path in graph_files(folder)}
    found += [
        f"api/{path.name} has no graph" for path in sorted((folder / "api").glob("*.json")) if path.name not in graphs
    ]
    return found


def write(folder: Path = GRAPHS) -> None:
    """Sets this version in every graph, and writes every API prompt."""
    (folder / "api").mkdir(exist_ok=True)
    for path in graph_files(folder):
        try:
            graph = with_version(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):
            graph = None  # what is wrong with it is said when it is read
        text = json.dumps(graph, indent=1, ensure_ascii=False) + "\n"
        if graph is not None and path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        (folder / "api" / path.name).write_text(prompt_text(api_prompt(read_graph(path))), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make workflows/api/*.json from the graphs in workflows/*.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail and list what is not in step")
    try:
        if parser.parse_args().check:
            lines = stale()
            if lines:
                raise WorkflowError("\n".join([*lines, "Run `python scripts/workflows.py`."]))
        else:
            write()
    except WorkflowError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
