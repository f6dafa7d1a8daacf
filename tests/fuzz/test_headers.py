"""Damaged weight files for a while, and archives that want to run code. `make shows` tries ten thousand files."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mochi_core.errors import WeightsError
from mochi_core.weights import build
from mochi_core.weights.checkpoint import Checkpoint
from mochi_core.weights.lora_file import read_lora

REPO = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).parent / "fuzz_headers.py"
SECONDS = 100 if os.environ.get("CI") == "true" else 15
FEWEST = 50


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it")
def test_no_damaged_file_does_harm(tmp_path):
    pytest.importorskip("gguf")
    command = [sys.executable, str(SCRIPT), "--seconds", str(SECONDS), "--keep", str(tmp_path / "failures")]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS + 300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    tried = re.search(r"^(\d+) damaged files", done.stdout, re.MULTILINE)
    assert tried and int(tried[1]) >= FEWEST, done.stdout


# Archives that want to run code

LAYER = "blocks.0.attn.qkv_x"


@pytest.fixture
def wish(tmp_path):
    """What a pickle with it asks for is a file called `ran`."""

    class Wish:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    yield Wish()
    assert not (tmp_path / "ran").exists()


def content(wish):
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(4, 192), f"{LAYER}.lora_B.weight": torch.ones(576, 4)}
    return {"state_dict": tensors, "kwargs": wish}


FORMS = {
    "zip": lambda wish, path: torch.save(content(wish), path),
    "old": lambda wish, path: torch.save(content(wish), path, _use_new_zipfile_serialization=False),
    **{
        f"pickle {protocol}": lambda wish, path, protocol=protocol: path.write_bytes(pickle.dumps(wish, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}
READERS = {
    "checkpoint": Checkpoint,
    "dit": build.load_dit,
    "vae": build.load_vae,
    "t5": build.load_t5,
    "lora": lambda path: read_lora(path, torch.nn.Module()),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ("weights.pt", "pytorch_model.bin", "weights.safetensors"))
def test_a_pickle_runs_no_code(wish, tmp_path, form, reader, name):
    FORMS[form](wish, tmp_path / name)
    with pytest.raises(WeightsError, match=rf"{name} .*cannot be read") as caught:
        READERS[reader](tmp_path / name)
    assert str(tmp_path / name) in caught.value.value
    if form in ("zip", "old"):
        assert "without running code from it" in caught.value.value and "mkdir" in caught.value.value
        assert "no code in them runs" in caught.value.rule and "safetensors" in caught.value.remedy


@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_among_shards_runs_no_code(wish, tmp_path, reader):
    FORMS["zip"](wish, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="without running code from it"):
        READERS[reader](tmp_path)
    index = {"weight_map": {f"{LAYER}.weight": "pytorch_model.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="without running code from it"):
        READERS[reader](tmp_path / "pytorch_model.bin.index.json")


def test_the_wish_would_be_granted_elsewhere(tmp_path):
    class Wish:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save(content(Wish()), tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "ran").exists()
