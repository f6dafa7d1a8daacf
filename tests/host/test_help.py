"""The help pages of the nodes, against the nodes as the host describes them and as it serves the pages."""

import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import RunningHost

from scripts import comfyui, locales

DOCS = comfyui.REPO / "js" / "docs"
PACK = "mochi-video"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# How tables are headed, and how they write the values that are no numbers or choices: by language.
WORDS = {
    "en": {"input": "Input", "output": "Output", "on": "on", "off": "off", "empty": "empty", "advanced": "*Advanced.*"},
    "zh": {"input": "输入", "output": "输出", "on": "开", "off": "关", "empty": "空", "advanced": "*高级。*"},
}
NODES = sorted(path.stem for path in DOCS.glob("*.md"))
PAGES = [(node, language) for node in NODES for language in WORDS]


@dataclass(frozen=True)
class Input:
    kind: str
    default: Any
    advanced: bool


def page_path(node: str, language: str) -> Path:
    """Where the page looks for the help of a node: a language's own first, then the one that is English."""
    return DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"


def text_of(node: str, language: str) -> str:
    return page_path(node, language).read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Every table as its rows of cells, the heading first."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            found[-1].append(cells)
    return found


def table_of(node: str, language: str, what: str) -> list[list[str]]:
    """The rows of the one table that says the node's inputs, or outputs."""
    (table,) = [table for table in tables(text_of(node, language)) if table[0][0] == WORDS[language][what]]
    return table[1:]


def plain(cell: str) -> str:
    return cell.strip("`")


def default_of(kind: str, cell: str, language: str) -> Any:
    """A default as a table writes it; None where there is none."""
    words = WORDS[language]
    if not cell:
        return None
    if kind == "BOOLEAN":
        return {words["on"]: True, words["off"]: False}[cell]
    if cell == words["empty"]:
        return ""
    return float(plain(cell)) if kind in ("INT", "FLOAT") else plain(cell)


@pytest.fixture(scope="module")
def nodes(host: RunningHost) -> dict[str, Any]:
    return {name: info for name, info in host.get("/object_info").items() if name.startswith("MochiVideo")}


def inputs_of(info: dict[str, Any]) -> dict[str, Input]:
    given = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return {
        name: Input(kind, options.get("default"), bool(options.get("advanced")))
        for name, (kind, options) in given.items()
    }


def fetched(host: RunningHost, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{host.port}{path}", timeout=60) as answer:
        return answer.read().decode()


def test_each_node_has_a_page_and_each_page_a_node(nodes: dict[str, Any]) -> None:
    assert sorted(nodes) == NODES
    assert sorted(path.parent.name for path in DOCS.glob("*/zh.md")) == NODES


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_the_tables_name_exactly_the_inputs_with_their_types_and_defaults(
    nodes: dict[str, Any], node: str, language: str
) -> None:
    written = {}
    for name, kind, default, meaning in table_of(node, language, "input"):
        assert plain(name) not in written, name
        advanced = meaning.startswith(WORDS[language]["advanced"])
        written[plain(name)] = Input(kind, default_of(kind, default, language), advanced)
        assert len(meaning) > len(WORDS[language]["advanced"]) * advanced, name
    assert written == inputs_of(nodes[node])


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_the_tables_name_exactly_the_outputs_in_their_order(nodes: dict[str, Any], node: str, language: str) -> None:
    info = nodes[node]
    rows = table_of(node, language, "output")
    assert [(plain(name), kind) for name, kind, _ in rows] == list(
        zip(info["output_name"], info["output"], strict=True)
    )
    assert all(meaning for _, _, meaning in rows)


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_the_tables_name_every_choice_that_is_no_file(nodes: dict[str, Any], node: str, language: str) -> None:
    """A table of its own says what each choice means, when there is one; none may be left out or made up."""
    given = {**nodes[node]["input"].get("required", {}), **nodes[node]["input"].get("optional", {})}
    for table in tables(text_of(node, language)):
        name = plain(table[0][0])
        if name in given:
            assert [plain(row[0]) for row in table[1:]] == given[name][1]["options"], name


@pytest.mark.parametrize("node", NODES)
def test_both_languages_have_the_same_tables(node: str) -> None:
    english, chinese = (tables(text_of(node, language)) for language in WORDS)
    assert [[len(row) for row in table] for table in english] == [[len(row) for row in table] for table in chinese]


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_page_shows_its_node_and_links_to_nothing_that_the_sidebar_cannot_open(node: str, language: str) -> None:
    """Pictures start at the folder of all pages, whatever the language; other links must be whole addresses."""
    pictures = [target for mark, _, target in LINK.findall(text_of(node, language)) if mark]
    assert pictures == [f"images/{node}.png"]
    for mark, _, target in LINK.findall(text_of(node, language)):
        assert mark or target.startswith("https://"), target


@pytest.mark.parametrize("node", NODES)
def test_the_picture_of_a_node_exists(node: str) -> None:
    assert (DOCS / "images" / f"{node}.png").is_file()


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_nodes_are_called_as_they_are_in_that_language(node: str, language: str) -> None:
    names = {node: texts["display_name"] for node, texts in locales.read(language).items()}
    text = text_of(node, language)
    assert text.startswith(f"# {names[node]}\n")
    assert set(re.findall(r"\*\*(Mochi Video [^*]+)\*\*", text.replace("\n", " "))) <= set(names.values())


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_the_host_serves_the_page(host: RunningHost, node: str, language: str) -> None:
    path = page_path(node, language)
    assert fetched(host, f"/extensions/{PACK}/docs/{path.relative_to(DOCS).as_posix()}") == text_of(node, language)


def test_a_language_without_pages_gets_the_english_one(host: RunningHost) -> None:
    """The page asks for the language's own first, and must be told that there is none."""
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(host, f"/extensions/{PACK}/docs/{NODES[0]}/fr.md")
