import json
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mochi_core.errors import WeightsError
from mochi_core.weights.checkpoint import NAMES_SHOWN, Checkpoint, check_floating, check_names, fill


@pytest.fixture
def write(tmp_path):
    """`write(tensors, metadata)`: a safetensors file."""

    def write_file(tensors, metadata=None):
        save_file(tensors, tmp_path / "weights.safetensors", metadata=metadata)
        return tmp_path / "weights.safetensors"

    return write_file


class TestReading:
    def test_names_metadata_and_tensors(self, write):
        checkpoint = Checkpoint(write({"a.w": torch.ones(2), "b": torch.zeros(1)}, {"k": "v"}))
        assert sorted(checkpoint.names) == ["a.w", "b"]
        assert checkpoint.metadata == {"k": "v"}
        assert torch.equal(checkpoint.tensor("a.w"), torch.ones(2))

    def test_no_metadata(self, write):
        checkpoint = Checkpoint(write({"a": torch.ones(1)}))
        assert checkpoint.metadata == {}
        assert checkpoint.json_metadata("config") is None

    @pytest.mark.parametrize("size", (0x280, 0x380, 0x480, 0x580))
    def test_a_header_as_long_as_other_files_start(self, tmp_path, size):
        path = tmp_path / "weights.safetensors"
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(size)
        path.write_bytes(size.to_bytes(8, "little") + header + bytes(4))
        assert Checkpoint(path).names == ("a",)

    def test_entries_know_shape_and_type_before_they_are_read(self, write):
        entries = Checkpoint(write({"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)})).entries
        assert {name: (entry.shape, entry.kind) for name, entry in entries.items()} == {
            "a": ((2, 3), "F32"),
            "b": ((1,), "BF16"),
        }
        assert torch.equal(entries["a"].load(), torch.ones(2, 3))

    def test_metadata_as_json(self, write):
        path = write({"a": torch.ones(1)}, {"good": '{"depth": 4}', "bad": "{depth: 4"})
        assert Checkpoint(path).json_metadata("good") == {"depth": 4}
        with pytest.raises(
            WeightsError, match=r"weights.safetensors: the metadata 'bad' cannot be read .*: it must be JSON"
        ):
            Checkpoint(path).json_metadata("bad")


class TestFilesThatCannotBeRead:
    def refused(self, path, what):
        with pytest.raises(WeightsError, match=what) as caught:
            Checkpoint(path)
        assert str(path) in caught.value.value
        assert "safetensors file" in caught.value.rule and "download" in caught.value.remedy

    @pytest.mark.parametrize("name", ("missing.safetensors", "no/such/folder.safetensors"))
    def test_missing(self, tmp_path, name):
        self.refused(tmp_path / name, "does not exist or is no file")

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(WeightsError, match=r"is a folder without weights: .* Choose the folder"):
            Checkpoint(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\0" * 7,
            b"\0" * 100,
            random.Random(0).randbytes(5000),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            (2**62).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"[]",
        ],
        ids=["empty", "short", "zeros", "random", "git-lfs pointer", "huge header", "list"],
    )
    def test_content(self, tmp_path, content):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(content)
        self.refused(path, rf"\({len(content)} bytes\) cannot be read: ")

    @pytest.mark.parametrize("kept", (0.1, 0.5, 0.999))
    def test_truncated(self, write, kept):
        path = write({f"layer{i}": torch.ones(100) for i in range(10)})
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        self.refused(path, "cannot be read")

    @pytest.mark.parametrize("kind, size", (("F6_E2M3", 24), ("F6_E3M2", 24)))
    def test_types_that_torch_does_not_have(self, tmp_path, kind, size):
        path = tmp_path / "weights.safetensors"
        header = json.dumps({"a": {"dtype": kind, "shape": [4, 8], "data_offsets": [0, size]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        with pytest.raises(WeightsError, match=f"has a in {kind} .*torch must have a type.*another format"):
            Checkpoint(path).tensor("a")


@pytest.mark.parametrize("kind", ("BOOL", "U8", "I64", "C64", "F4", "F6_E2M3", "F8_E8M0", "F8_E4M3FNUZ", "torch.qint8"))
def test_types_that_are_no_weights(kind):
    with pytest.raises(WeightsError, match=rf"1 such \(a in {kind}\): weights must be floating point"):
        check_floating({"a": kind}, "here")


def test_types_of_weights():
    kinds = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3 scaled", "Q8_0", "Q4_K", "IQ4_XS", "TQ1_0")
    check_floating({kind: kind for kind in kinds}, "here")


class TestFilling:
    @pytest.fixture
    def network(self):
        return nn.Sequential(nn.Linear(3, 4, device="meta"), nn.Linear(4, 2, device="meta"))

    @pytest.fixture
    def tensors(self):
        shapes = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4), "1.bias": (2,)}
        return {name: torch.ones(shape) for name, shape in shapes.items()}

    def test_the_tensors_become_the_parameters(self, network, tensors):
        fill(network, tensors, "here")
        assert all(network.get_parameter(name).data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert network(torch.ones(1, 3)).tolist() == [[17.0, 17.0]]

    def test_changing_a_parameter_leaves_the_file_alone(self, network, tensors, write):
        path = write(tensors)
        before = path.read_bytes()
        checkpoint = Checkpoint(path)
        fill(network, {name: checkpoint.tensor(name) for name in checkpoint.names}, str(path))
        with torch.no_grad():
            network[0].weight.fill_(5)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("name", ("0.weight", "1.bias"))
    def test_missing(self, network, tensors, name):
        del tensors[name]
        with pytest.raises(
            WeightsError, match=rf"^here does not fit Sequential: 1 missing \({name}\): .*download it again"
        ):
            fill(network, tensors, "here")

    def test_unknown(self, network, tensors):
        tensors |= {"lora.up": torch.ones(1), "2.weight": torch.ones(1)}
        with pytest.raises(WeightsError, match=r"here does not fit Sequential: 2 unknown \(2.weight, lora.up\): "):
            fill(network, tensors, "here")

    def test_wrong_shape(self, network, tensors):
        tensors["1.weight"] = torch.ones(4, 2)
        message = r"1 of a wrong shape \(1.weight \(4, 2\) instead of \(2, 4\)\): "
        with pytest.raises(WeightsError, match=message):
            fill(network, tensors, "here")

    def test_every_kind_is_told_at_once(self, network, tensors):
        del tensors["0.bias"]
        tensors |= {"zebra": torch.ones(1), "1.bias": torch.ones(7)}
        message = r"1 missing \(0.bias\); 1 unknown \(zebra\); 1 of a wrong shape \(1.bias \(7,\) instead of \(2,\)\)"
        with pytest.raises(WeightsError, match=message):
            check_names(network, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "here")

    def test_long_lists_are_cut_and_counted(self, network, tensors):
        tensors |= {f"zebra{i:02}": torch.ones(1) for i in range(20)}
        message = rf"20 unknown \(zebra00, .*zebra{NAMES_SHOWN - 1:02} and {20 - NAMES_SHOWN} more\)"
        with pytest.raises(WeightsError, match=message):
            fill(network, tensors, "here")

    def test_nothing_is_filled_when_something_is_wrong(self, network, tensors):
        del tensors["0.bias"]
        with pytest.raises(WeightsError):
            fill(network, tensors, "here")
        assert all(parameter.is_meta for parameter in network.parameters())
