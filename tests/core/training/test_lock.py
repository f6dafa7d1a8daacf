"""The lock of a folder ends with its process, however that ends."""

import subprocess
import sys

import pytest

from mochi_core.errors import TrainingError
from mochi_core.training import lock
from mochi_core.training.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from mochi_core.errors import TrainingError
from mochi_core.training.lock import locked
with locked(Path(sys.argv[1]), TrainingError):
    print("held", flush=True)
    time.sleep(600)
"""


def test_killed_processes_hold_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(TrainingError, match="another process"), locked(tmp_path, TrainingError):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path, TrainingError):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def unknown(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock, "_lock", unknown)
    with locked(tmp_path / "new", TrainingError):
        assert (tmp_path / "new").is_dir()
    assert "cannot be locked" in caplog.text
