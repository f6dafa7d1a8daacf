"""Torch archives and folders of shards; what is asked of safetensors and GGUF is in tests of their own."""

import json
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from mochi_core.errors import WeightsError
from mochi_core.weights.checkpoint import Checkpoint
from mochi_core.weights.files import Unchanged


def refused(path, message):
    with pytest.raises(WeightsError, match=message) as caught:
        Checkpoint(path)
    assert str(path) in caught.value.value


class TestTorchArchives:
    @pytest.fixture
    def write(self, tmp_path):
        """`write(content)`: a torch archive."""

        def write_file(content, zipped=True):
            torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
            return tmp_path / "weights.pt"

        return write_file

    @pytest.mark.parametrize("zipped", (True, False))
    @pytest.mark.parametrize("wrap", (lambda held: held, lambda held: {"state_dict": held, "step": 3}))
    def test_state_dicts(self, write, zipped, wrap):
        held = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.zeros(4).requires_grad_(), "c": 5}
        checkpoint = Checkpoint(write(wrap(held), zipped))
        assert {name: (entry.shape, entry.kind) for name, entry in checkpoint.entries.items()} == {
            "a": ((2, 3), "BF16"),
            "b": ((4,), "F32"),
        }
        assert torch.equal(checkpoint.tensor("a"), held["a"]) and not checkpoint.tensor("b").requires_grad

    def test_plain_values_beside_the_tensors_are_metadata(self, write):
        kwargs = {"rank": 4, "names": ["a", None, 0.5]}
        checkpoint = Checkpoint(write({"state_dict": {"a": torch.ones(1)}, "kwargs": kwargs, "dtype": torch.float16}))
        assert checkpoint.metadata == {"kwargs": json.dumps(kwargs)}

    def test_one_tensor_may_have_several_names(self, write):
        tensor = torch.ones(1000)
        assert Checkpoint(write({"a": tensor, "b": tensor, "c": tensor[:10]})).names == ("a", "b", "c")

    @pytest.mark.parametrize("content", (torch.ones(1), [torch.ones(1)], {0: torch.ones(1)}, {"state_dict": {}}, None))
    def test_no_state_dict(self, write, content):
        refused(write(content), "holds no tensors")

    @pytest.mark.parametrize("zipped", (True, False))
    @pytest.mark.parametrize("kept", (0.1, 0.5, 0.99))
    def test_truncated(self, write, zipped, kept):
        path = write({f"layer{i}": torch.ones(100) for i in range(10)}, zipped)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        refused(path, "cannot be read")

    def test_an_error_that_says_nothing(self, tmp_path):
        path = tmp_path / "weights.pt"
        path.write_bytes(b"\x80\x02")
        refused(path, "cannot be read: EOFError")

    def test_code_is_named_but_not_run(self, write, tmp_path):
        class Wish:
            def __reduce__(self):
                return (tmp_path.joinpath("ran").touch, ())

        refused(
            write({"a": torch.ones(1), "b": Wish()}), "without running code from it: .*getattr.*no code in them runs"
        )
        assert not (tmp_path / "ran").exists()

    def test_few_bytes_that_pose_as_many(self, write):
        refused(write({"a": torch.ones(1).expand(2**20, 2**20)}), "has tensors of 4398046511104 bytes: .*contiguous")

    def test_compressed(self, write, tmp_path):
        path = write({"a": torch.ones(1)})
        with zipfile.ZipFile(path) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in members.items():
                new.writestr(name, content + bytes(10**6 if name.endswith("data.pkl") else 0))
        refused(path, "is compressed, or unpacks to more than its size")

    @pytest.mark.parametrize("kind", ("sparse", "rows", "nested", "meta", "quantized"))
    def test_tensors_of_other_kinds(self, write, kind):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says of some that they are new or will go
            tensor = {
                "sparse": lambda: torch.sparse_coo_tensor(size=(10**6, 10**6)),
                "rows": lambda: torch.ones(2, 2).to_sparse_csr(),
                "nested": lambda: torch.nested.nested_tensor([torch.ones(4), torch.ones(2)]),
                "meta": lambda: torch.empty(10**6, 10**6, device="meta"),
                "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            }[kind]()
            refused(write({"a": torch.ones(1), "b": tensor}), "1 sparse, nested or quantised tensors, .* such as b")

    @pytest.mark.parametrize("kind", ("twice and twice again", "round and round", "deep"))
    def test_values_without_an_end(self, write, kind):
        """They are no metadata, and take no time."""
        value = []
        if kind == "round and round":
            value.append(value)
        for _ in range(60 if kind == "twice and twice again" else 0):
            value = [value, value]
        path = write({"state_dict": {"a": torch.ones(1)}, "x": value})
        if kind == "deep":
            deep = b"\x80\x02}(X\n\0\0\0state_dict}X\1\0\0\0x" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"u."
            path.write_bytes(
                pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + deep
            )
            refused(path, "cannot be read")
        else:
            assert Checkpoint(path).metadata == {}


class TestIndexes:
    @pytest.fixture
    def folder(self, tmp_path):
        """`folder(file)`: a folder whose index says that its only tensor is in `file`."""

        def write(file):
            save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
            return tmp_path

        return write

    def test_a_shard_beside_it(self, folder):
        assert Checkpoint(folder("model.safetensors")).names == ("a",)
        assert Checkpoint(folder("model.safetensors") / "model.safetensors.index.json").names == ("a",)

    @pytest.mark.parametrize(
        "file",
        (
            "",
            ".",
            "..",
            "../model.safetensors",
            "model.safetensors.index.json",
            "gone.safetensors",
            "a" * 300,
            "\0",
            "\ud800",
        ),
        ids=ascii,
    )
    def test_other_files(self, folder, file):
        refused(folder(file), "names the file .*, which is not in its folder")

    def test_a_name_that_no_file_can_have(self, tmp_path):
        refused(tmp_path / ("a" * 300), "does not exist or is no file")


def test_a_folder_with_two_models_and_no_index(tmp_path):
    for name in ("one", "two"):
        save_file({"a.weight": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"has a.weight in two.safetensors and in another file"):
        Checkpoint(tmp_path)


class TestUnchanged:
    @pytest.fixture
    def weights(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file({"a": torch.ones(100)}, path)
        return path

    def changed(self, check, path, message):
        with pytest.raises(WeightsError, match=message) as caught:
            check()
        assert str(path) in caught.value.value and "load it again" in caught.value.remedy

    def test_as_long_as_it_is_so(self, weights):
        check = Unchanged(weights)
        check()
        weights.read_bytes()
        check()

    def test_shorter(self, weights):
        check, size = Unchanged(weights), weights.stat().st_size
        weights.write_bytes(weights.read_bytes()[:-1])
        self.changed(check, weights, f"has changed .*: {size - 1} bytes instead of {size}")

    def test_written_anew(self, weights):
        check, status = Unchanged(weights), weights.stat()
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        self.changed(check, weights, "written anew")

    def test_gone(self, weights, tmp_path):
        check = Unchanged(weights)
        weights.unlink()
        self.changed(check, weights, "is gone or cannot be reached")
        self.changed(lambda: Unchanged(tmp_path / "never.safetensors"), "never.safetensors", "is gone")
        self.changed(lambda: Unchanged(tmp_path / ("a" * 300)), "aaa", "is gone")

    @pytest.mark.parametrize("place", ("", "vae", "transformer"))
    def test_each_file_of_a_folder(self, tmp_path, place):
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        names = [f"part{i}.safetensors" for i in range(2)]
        for i, name in enumerate(names):
            save_file({f"a{i}": torch.ones(100)}, folder / name)
        (folder / "x.safetensors.index.json").write_text(
            json.dumps({"weight_map": {f"a{i}": name for i, name in enumerate(names)}})
        )
        (folder / "notes.txt").write_text("no weights")
        for path in (tmp_path, folder, folder / "x.safetensors.index.json"):
            check, content = Unchanged(path), (folder / names[1]).read_bytes()
            (folder / "notes.txt").write_text("other notes")
            check()
            (folder / names[1]).write_bytes(content[:-1])
            self.changed(check, folder / names[1], "has changed")
            (folder / names[1]).write_bytes(content)
