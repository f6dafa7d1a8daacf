"""One real ComfyUI for all host tests."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Graph, RunningHost

from scripts import comfyui

HERE = Path(__file__).parent
LOGS = comfyui.REPO / ".cache" / "logs"


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    if not (comfyui.path() / "main.py").exists() and not os.environ.get("CI"):
        pytest.skip(f"no ComfyUI at {comfyui.path()}: run `make setup`")
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / "host-tests.log"
    log.write_bytes(b"")
    base = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(HERE / "probe", base / "custom_nodes" / "probe")
    for folder in ("diffusion_models", "text_encoders", "vae", "checkpoints", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    with RunningHost(base, base / "output", log) as running:
        yield running


@pytest.fixture
def graph() -> Graph:
    return Graph()
