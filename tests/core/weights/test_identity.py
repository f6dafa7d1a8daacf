"""What files are known by."""

from mochi_core.weights import identity as module
from mochi_core.weights.identity import identity


def test_large_files_are_sampled(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(5000))
    whole = identity(path)
    assert whole.startswith("sha256:")
    for name, value in (("HASHED_WHOLE", 4000), ("HASHED_HEADER", 100), ("HASHED_SAMPLE", 10), ("SAMPLES", 4)):
        monkeypatch.setattr(module, name, value)
    sampled = identity(path)
    assert sampled.startswith("sampled:")
    for place, seen in ((0, True), (99, True), (4999, True), (1665, True), (800, False)):
        content = bytearray(5000)
        content[place] = 1
        path.write_bytes(content)
        assert (identity(path) != sampled) == seen
    path.write_bytes(bytes(5001))
    assert identity(path) != sampled


def test_a_folder_is_its_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = identity(tmp_path)
    (tmp_path / "README.md").write_bytes(b"words")
    assert identity(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert identity(tmp_path) != before
