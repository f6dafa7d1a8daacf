"""The map names places that exist."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PATH = re.compile(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|toml|md|json))`")


def named_paths(document: str) -> list[str]:
    return sorted(set(PATH.findall((REPO / document).read_text(encoding="utf-8"))))


def test_the_map_of_the_architecture_is_not_empty() -> None:
    assert len(named_paths("docs/architecture.md")) > 50


@pytest.mark.parametrize("path", named_paths("docs/architecture.md"))
def test_every_path_of_the_architecture_exists(path: str) -> None:
    inside = [REPO, REPO / "nodes", REPO / "mochi_core"]
    assert any((folder / path).exists() for folder in inside), path


def test_every_module_of_the_core_and_every_node_file_is_on_the_map() -> None:
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = [*(REPO / "mochi_core").rglob("*.py"), *(REPO / "nodes").glob("*.py")]
    missing = [
        str(f.relative_to(REPO)) for f in files if f.name != "__init__.py" and str(f.relative_to(REPO)) not in text
    ]
    assert not missing
