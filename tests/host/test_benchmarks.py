"""The benchmark of the host's memory modes runs on a CPU, where there are none, and finds the host to repeat itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import host_memory
from scripts import comfyui

pytestmark = pytest.mark.skipif(
    not (comfyui.path() / "main.py").exists() and not os.environ.get("CI"), reason=f"no ComfyUI at {comfyui.path()}"
)


def test_host_memory_dry_run(tmp_path: Path) -> None:
    output, script = tmp_path / "result.json", comfyui.REPO / "benchmarks" / "gpu" / "host_memory.py"
    options = ["--device", "cpu", "--set", "6.frames=7", "7.steps=2", "--log", str(tmp_path / "log")]
    command = [sys.executable, str(script), *options, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["modes"].keys() == {"default", "default again"}
    for mode in result["modes"].values():
        assert "error" not in mode
        for one in mode["runs"].values():
            assert one["seconds"] > 0 and one["outputs"].keys() == {"latents", "frames"}
            assert one["peak_rss_bytes"] is None or one["peak_rss_bytes"] > 1e8
        cold, warm = (mode["runs"][name]["outputs"] for name in ("cold", "warm"))
        assert all(cold[kind] != warm[kind] for kind in cold), "another seed, another video"
    assert len(result["identical"]) == 4 and all(result["identical"].values())


def test_modes_that_the_host_has() -> None:
    here, missing = host_memory.modes("cuda", None)
    assert {"default", "lowvram", "novram", "highvram"} <= here.keys()
    assert here.keys() | missing.keys() == host_memory.MODES.keys()


def test_a_change_that_the_workflow_has_no_place_for() -> None:
    prompt = {"7": {"class_type": "Sampler", "inputs": {"steps": 30, "text": ""}}}
    changed = host_memory.changed(prompt, ["7.steps=2", "7.text=a lake"])
    assert changed["7"]["inputs"] == {"steps": 2, "text": "a lake"} and prompt["7"]["inputs"]["steps"] == 30
    with pytest.raises(SystemExit, match="has no input 'step'"):
        host_memory.changed(prompt, ["7.step=2"])
