"""The import rules that import-linter cannot hold: a submodule of torch, and the files beside `mochi_core`."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
NETWORKS = [path for part in ("dit", "vae", "attention", "text") for path in (REPO / "mochi_core" / part).glob("*.py")]
NODES = sorted((REPO / "nodes").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports by its full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.name)
def test_networks_know_no_other_process(path: Path) -> None:
    assert not {name for name in imported(path) if name.startswith("torch.distributed")}


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_only_the_host_files_import_the_host(path: Path) -> None:
    host = {name for name in imported(path) if name.split(".")[0] in ("comfy", "folder_paths", "latent_preview")}
    assert not host or path.name == "_host.py" or path.name.startswith("native_")
    assert "nodes" not in imported(path), "ComfyUI owns that name"
