import importlib.util
import json
import struct
import sys
import time
import tracemalloc
import warnings
from random import Random

import gguf
import numpy as np
import pytest
import torch

from mochi_core.errors import WeightsError
from mochi_core.weights.blocks import BLOCK_FORMATS, Packed
from mochi_core.weights.gguf_file import LARGEST_HEADER, MOST_ENTRIES, GGUFFile

Type = gguf.GGMLQuantizationType

# Where a block has its float16 numbers: random bytes there would be infinite now and then.
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "IQ4_XS": (0,)}


def random_rows(name, rows, blocks_in_row):
    """Rows of random valid blocks, (rows, bytes) uint8."""
    random = np.random.default_rng(0)
    _, block_bytes = gguf.GGML_QUANT_SIZES[Type[name]]
    packed = random.integers(0, 256, (rows * blocks_in_row, block_bytes), dtype=np.uint8)
    for place in HALVES[name]:
        packed[:, place : place + 2] = random.normal(size=(len(packed), 1)).astype(np.float16).view(np.uint8)
    return packed.reshape(rows, -1)


def weights(*shape):
    return np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)


@pytest.fixture
def write(tmp_path):
    """`write(tensors, add_metadata)`: a file by the gguf package, from (array, type) by name."""

    def write_file(tensors, add_metadata=lambda writer: None):
        path = tmp_path / "weights.gguf"
        writer = gguf.GGUFWriter(path, "mochi")
        add_metadata(writer)
        for name, (array, type_) in tensors.items():
            writer.add_tensor(name, array, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write_file


class TestPlainTensors:
    @pytest.mark.parametrize("dtype", ("float64", "float32", "float16", "int64", "int32", "int16", "int8"))
    def test_numbers(self, write, dtype):
        array = (100 * weights(3, 5, 7)).astype(dtype)
        file = GGUFFile(write({"a": (array, None)}))
        assert file.shape("a") == (3, 5, 7)
        assert file.type_name("a") == dtype.replace("float", "F").replace("int", "I")
        assert torch.equal(file.tensor("a"), torch.from_numpy(array))

    def test_bfloat16(self, write):
        array = weights(4, 6)
        file = GGUFFile(write({"a": (gguf.quants.quantize(array, Type.BF16), Type.BF16)}))
        assert (file.shape("a"), file.type_name("a")) == ((4, 6), "BF16")
        assert torch.equal(file.tensor("a"), torch.from_numpy(array).bfloat16())

    def test_several_with_odd_sizes(self, write):
        arrays = {name: weights(size) for name, size in zip("abcd", (1, 7, 33, 2))}
        file = GGUFFile(write({name: (array, None) for name, array in arrays.items()}))
        assert file.names == ("a", "b", "c", "d")
        assert all(np.array_equal(file.tensor(name), array) for name, array in arrays.items())

    def test_another_alignment(self, write):
        arrays = {"a": weights(3), "b": weights(3)}
        tensors = {name: (array, None) for name, array in arrays.items()}
        file = GGUFFile(write(tensors, lambda writer: writer.add_custom_alignment(256)))
        assert all(np.array_equal(file.tensor(name), array) for name, array in arrays.items())

    def test_mapped_and_private(self, write):
        path = write({"a": (weights(4, 4), None), "b": (weights(2, 64), None)})
        before = path.read_bytes()
        file = GGUFFile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tensor = file.tensor("a")
        assert tensor.data_ptr() == file.tensor("a").data_ptr()
        tensor.fill_(5)
        assert path.read_bytes() == before

    def test_tensors_outlive_the_file_object(self, write):
        array = weights(300, 300)
        tensor = GGUFFile(write({"a": (array, None)})).tensor("a")
        assert np.array_equal(tensor, array)

    def test_unknown_name(self, write):
        with pytest.raises(KeyError):
            GGUFFile(write({"a": (weights(1), None)})).tensor("b")


class TestQuantizedTensors:
    @pytest.mark.parametrize("name", BLOCK_FORMATS)
    def test_matrices_stay_packed(self, write, name):
        rows = random_rows(name, 5, 2) if name in HALVES else gguf.quants.quantize(weights(5, 96), Type[name])
        file = GGUFFile(write({"before": (weights(3), None), "a": (rows, Type[name])}))
        packed = file.tensor("a")
        assert isinstance(packed, Packed) and packed.format is BLOCK_FORMATS[name]
        assert file.type_name("a") == name
        assert packed.data.data_ptr() == file.tensor("a").data.data_ptr()
        expected = gguf.quants.dequantize(rows, Type[name])
        assert file.shape("a") == packed.shape == expected.shape
        assert np.array_equal(packed.dequantized(torch.float32), expected)

    @pytest.mark.parametrize("name", ("Q3_K", "Q2_K", "IQ4_XS"))
    def test_others_are_unpacked(self, write, name):
        rows = random_rows(name, 6, 3)
        file = GGUFFile(write({"a": (rows, Type[name])}))
        assert (file.shape("a"), file.type_name("a")) == ((6, 3 * 256), name)
        tensor = file.tensor("a")
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor, gguf.quants.dequantize(rows, Type[name]))

    @pytest.mark.parametrize("shape", [(64,), (2, 3, 32), (2, 3, 2, 32)])
    def test_what_is_no_matrix_is_unpacked(self, write, shape):
        packed = gguf.quants.quantize(weights(*shape), Type.Q8_0)
        tensor = GGUFFile(write({"a": (packed, Type.Q8_0)})).tensor("a")
        assert tensor.shape == shape and tensor.dtype == torch.float32
        assert np.array_equal(tensor, gguf.quants.dequantize(packed, Type.Q8_0))

    def test_others_that_are_no_matrix(self, write):
        packed = random_rows("Q3_K", 6, 1).reshape(2, 3, -1)
        tensor = GGUFFile(write({"a": (packed, Type.Q3_K)})).tensor("a")
        assert np.array_equal(tensor, gguf.quants.dequantize(packed, Type.Q3_K))

    def test_a_type_that_nobody_unpacks(self, write):
        path = write({"a": (np.zeros((2, 292), np.uint8), Type.Q8_K)})
        with pytest.raises(WeightsError, match=r"has weights packed as Q8_K: .*cannot unpack.*\(Q8_0, .*newer gguf"):
            GGUFFile(path)

    def test_no_warnings_for_scales_that_are_no_numbers(self, write):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GGUFFile(write({"a": (np.full((1, 110), 0xFF, np.uint8), Type.Q3_K)})).tensor("a")


class TestMetadata:
    def test_texts_and_numbers(self, write):
        def add(writer):
            writer.add_string("config", '{"depth": 4}')
            writer.add_string("name", "もち")
            writer.add_bool("yes", True)
            writer.add_uint8("small", 200)
            writer.add_int64("below", -(2**62))
            writer.add_uint64("above", 2**63)
            writer.add_float32("half", 0.5)
            writer.add_float64("tenth", 0.1)
            writer.add_array("texts", ["a", "", "bcd"])
            writer.add_array("numbers", [1, 2, 3])
            writer.add_array("arrays", [[1, 2], [3, 4]])
            writer.add_string("last", "end")

        assert GGUFFile(write({"a": (weights(1), None)}, add)).metadata == {
            "general.architecture": "mochi",
            "config": '{"depth": 4}',
            "name": "もち",
            "yes": "true",
            "small": "200",
            "below": str(-(2**62)),
            "above": str(2**63),
            "half": "0.5",
            "tenth": "0.1",
            "last": "end",
        }


# A file by hand, so that each of its numbers can be wrong.


def text(content):
    return struct.pack("<Q", len(content)) + content


def header(tensors=0, keys=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def array(kind, count, content=b""):
    return key(b"array", 9, struct.pack("<IQ", kind, count) + content)


def entry(name=b"a", shape=(4,), kind=0, start=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


def alignment(kind, value):
    return header(keys=1) + key(b"general.alignment", kind, value)


ROOM = b"\0" * 256

BROKEN = {
    "empty": (b"", "begins with b''"),
    "zeros": (b"\0" * 100, "begins with"),
    "safetensors": ((2).to_bytes(8, "little") + b"{}", "begins with"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "begins with b'vers'"),
    "zip": (b"PK\3\4" + ROOM, "begins with"),
    "only magic": (b"GGUF", "does not end within its first 4 bytes"),
    "version 1": (header(version=1) + ROOM, "version is 1"),
    "version 4": (header(version=4) + ROOM, "version is 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is 50331648"),
    "count of tensors": (header(tensors=2**63) + ROOM, "9223372036854775808 tensors"),
    "count of tensors beyond the file": (header(tensors=20) + ROOM, "20 tensors"),
    "count of keys": (header(keys=2**64 - 1) + ROOM, "18446744073709551615 metadata keys"),
    "key's length": (header(keys=1) + struct.pack("<Q", 2**63) + ROOM, "does not end within"),
    "key's encoding": (header(keys=1) + key(b"\xff", 0, b"\0"), "not UTF-8"),
    "key twice": (header(keys=2) + key(b"k", 0, b"\1") * 2, "the key 'k' twice"),
    "type of a value": (header(keys=1) + key(b"k", 13, b"") + ROOM, "metadata type 13"),
    "text's length": (header(keys=1) + key(b"k", 8, struct.pack("<Q", 2**40)) + ROOM, "does not end within"),
    "text's encoding": (header(keys=1) + key(b"k", 8, text(b"\xc3")), "not UTF-8"),
    "number cut": (header(keys=1) + key(b"kkkkkkkkk", 10, b"\0" * 7), "does not end within"),
    "count of numbers": (header(keys=1) + array(0, 2**62) + ROOM, "4611686018427387904 numbers"),
    "count of wide numbers": (header(keys=1) + array(10, 33) + ROOM, "33 numbers"),
    "count of texts": (header(keys=1) + array(8, 2**62) + ROOM, "4611686018427387904 texts"),
    "length of a text in an array": (header(keys=1) + array(8, 2, text(b"a") + b"\xff" * 8) + ROOM, "does not end"),
    "count of arrays": (header(keys=1) + array(9, 2**62) + ROOM, "4611686018427387904 arrays"),
    "type in an array": (header(keys=1) + array(77, 0) + ROOM, "metadata type 77"),
    "arrays without an end": (header(keys=1) + array(9, 1, struct.pack("<IQ", 9, 1) * 50_000), "1 arrays in an array"),
    "alignment 0": (alignment(4, struct.pack("<I", 0)), "general.alignment is 0"),
    "alignment 1": (alignment(4, struct.pack("<I", 1)), "general.alignment is 1"),
    "alignment 48": (alignment(4, struct.pack("<I", 48)), "general.alignment is 48"),
    "alignment -32": (alignment(5, struct.pack("<i", -32)), "general.alignment is -32"),
    "alignment a text": (alignment(8, text(b"32")), "general.alignment is 32,"),
    "alignment a float": (alignment(6, struct.pack("<f", 32)), "general.alignment is 32.0"),
    "alignment an array": (alignment(9, struct.pack("<IQI", 4, 1, 32)), "general.alignment is None"),
    "name's length": (header(tensors=1) + b"\xff" * 8 + ROOM, "does not end within"),
    "name's encoding": (header(tensors=1) + entry(b"\x80") + ROOM, "not UTF-8"),
    "name twice": (header(tensors=2) + entry() + entry(start=32) + ROOM, "the tensor 'a' twice"),
    "count of dimensions": (header(tensors=1) + text(b"a") + b"\xff" * 4 + ROOM, "'a' has 4294967295 dimensions"),
    "nine dimensions": (header(tensors=1) + entry(shape=(1,) * 9) + ROOM, "'a' has 9 dimensions"),
    "empty tensor": (header(tensors=1) + entry(shape=(2**63, 0)) + ROOM, "'a' is empty"),
    "shape beyond the file": (header(tensors=1) + entry(shape=(65,)) + ROOM, "'a' would end at byte"),
    "shape that overflows to 0": (header(tensors=1) + entry(shape=(2**32, 2**32)) + ROOM, "'a' would end at byte"),
    "shape that overflows to 4": (header(tensors=1) + entry(shape=(2**62 + 1, 4)) + ROOM, "'a' would end at byte"),
    "type": (header(tensors=1) + entry(kind=99) + ROOM, "'a' is of the type 99"),
    "part of a block": (header(tensors=1) + entry(shape=(33, 32), kind=8) + ROOM, "blocks of Q8_0 have 32"),
    "one packed value": (header(tensors=1) + entry(shape=(), kind=2) + ROOM, "rows of 1 weights"),
    "start between": (header(tensors=1) + entry(start=3) + ROOM, "'a' begins at 3"),
    "start beyond the file": (header(tensors=1) + entry(start=2**63) + ROOM, "'a' would end at byte"),
    "start that wraps around": (header(tensors=1) + entry(start=2**64 - 64) + ROOM, "'a' would end at byte"),
    "overlap": (header(tensors=2) + entry(b"a", (9,)) + entry(b"b", start=32) + ROOM, "'b' overlaps"),
    "same place": (header(tensors=2) + entry(b"a") + entry(b"b") + ROOM, "overlaps"),
    "long name": (header(tensors=1) + entry(b"n" * 10_000) + b"\0" * 8, r"'n{80}' would end at byte"),
}


class TestFilesThatCannotBeRead:
    def refused(self, path, what):
        with pytest.raises(WeightsError, match=what) as caught:
            GGUFFile(path)
        assert str(path) in caught.value.value
        assert "GGUF file" in caught.value.rule and "download" in caught.value.remedy
        assert len(str(caught.value)) < 600

    @pytest.mark.parametrize("name", ("missing.gguf", "", "no/such/folder.gguf"))
    def test_missing_or_a_folder(self, tmp_path, name):
        self.refused(tmp_path / name, "does not exist or is no file")

    @pytest.mark.parametrize(("content", "what"), BROKEN.values(), ids=BROKEN)
    def test_broken(self, tmp_path, content, what):
        path = tmp_path / "weights.gguf"
        path.write_bytes(content)
        self.refused(path, rf"\({len(content)} bytes\) cannot be read: .*{what}")

    @pytest.mark.parametrize("kept", (0.05, 0.2, 0.5, 0.9, 0.999))
    def test_truncated(self, write, kept):
        path = write({f"layer{i}": (weights(8, 8), None) for i in range(10)}, lambda w: w.add_array("x", ["y"] * 20))
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        self.refused(path, "cannot be read")

    def test_too_many_entries(self, tmp_path):
        path = tmp_path / "weights.gguf"
        path.write_bytes(header(keys=MOST_ENTRIES + 1) + b"\0" * 13 * (MOST_ENTRIES + 1))
        self.refused(path, f"{MOST_ENTRIES + 1} metadata keys")

    def test_a_header_that_is_too_large(self, tmp_path):
        path = tmp_path / "weights.gguf"
        with path.open("wb") as file:
            file.write(header(keys=1) + array(0, LARGEST_HEADER - 100))
            file.truncate(2 * LARGEST_HEADER)
        GGUFFile(path)
        with path.open("r+b") as file:
            file.write(header(keys=1) + array(0, LARGEST_HEADER))
        self.refused(path, f"{LARGEST_HEADER} numbers")

    def test_became_shorter(self, write):
        path = write({"a": (weights(100, 100), None)})
        file = GGUFFile(path)
        with path.open("r+b") as opened:
            opened.truncate(100)
        with pytest.raises(WeightsError, match=r"has become shorter since it was opened: .*load it again"):
            file.tensor("a")

    def test_without_the_package(self, write, monkeypatch):
        """The module is there, and says what is missing once a GGUF file is opened."""
        path = write({"a": (weights(1), None)})
        monkeypatch.setitem(sys.modules, "gguf", None)
        spec = importlib.util.find_spec("mochi_core.weights.gguf_file")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.raises(WeightsError, match=r"reading one needs the gguf package\. pip install gguf"):
            module.GGUFFile(path)
        path.write_bytes(b"no such file" + ROOM)
        self.refused(path, "begins with b'no s'")


class TestHandmadeFilesThatCanBeRead:
    @pytest.mark.parametrize("version", (2, 3))
    def test_a_number_without_dimensions(self, tmp_path, version):
        path = tmp_path / "weights.gguf"
        start = header(tensors=1, version=version) + entry(shape=())
        path.write_bytes(start + b"\0" * (-len(start) % 32) + struct.pack("<f", 2.5))
        assert torch.equal(GGUFFile(path).tensor("a"), torch.tensor(2.5))

    def test_without_tensors(self, tmp_path):
        path = tmp_path / "weights.gguf"
        path.write_bytes(header(keys=1) + key(b"empty", 8, text(b"")))
        assert (GGUFFile(path).names, GGUFFile(path).metadata) == ((), {"empty": ""})

    def test_arrays_as_deep_as_the_file(self, tmp_path):
        path = tmp_path / "weights.gguf"
        deep = array(9, 1, struct.pack("<IQ", 9, 1) * 50_000 + struct.pack("<IQ", 0, 3) + b"abc")
        path.write_bytes(header(keys=2) + deep + key(b"k", 8, text(b"v")))
        assert GGUFFile(path).metadata == {"k": "v"}


@pytest.mark.parametrize(
    "content",
    [
        header(tensors=2**63) + ROOM,
        header(keys=2**63) + ROOM,
        header(keys=1) + array(10, 2**50) + ROOM,
        header(keys=1) + array(8, 2**50) + ROOM,
        header(keys=1) + array(9, 2**50) + ROOM,
        header(keys=1) + key(b"k", 8, struct.pack("<Q", 2**35)) + ROOM,
        header(tensors=1) + text(b"a") + struct.pack("<I", 2**31) + ROOM,
        header(tensors=1) + entry(shape=(2**40,)) + ROOM,
        header(tensors=1) + entry(shape=(2**40,), kind=int(Type.Q3_K)) + ROOM,
    ],
    ids=["tensors", "keys", "numbers", "texts", "arrays", "text", "dimensions", "shape", "packed shape"],
)
def test_sizes_that_a_file_claims_are_not_allocated(tmp_path, content):
    path = tmp_path / "weights.gguf"
    size = 2**20
    path.write_bytes(content + b"\0" * (size - len(content)))
    before = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError):
            GGUFFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 4
    assert time.perf_counter() - before < 2


def test_mutated_files_are_refused_or_read(write):
    """Whatever bytes change, there is a `WeightsError` or tensors that can be read to their end."""
    tensors = {
        "plain": (weights(3, 4), None),
        "half": (weights(5).astype(np.float16), None),
        "packed": (gguf.quants.quantize(weights(2, 64), Type.Q8_0), Type.Q8_0),
        "k": (random_rows("Q4_K", 2, 1), Type.Q4_K),
        "unpacked": (random_rows("Q3_K", 2, 1), Type.Q3_K),
    }

    def add(writer):
        writer.add_array("texts", ["a", "bc"])
        writer.add_array("numbers", [1, 2])
        writer.add_custom_alignment(32)
        writer.add_string("config", json.dumps({"depth": 4}))

    path = write(tensors, add)
    original = path.read_bytes()
    header_size = original.index(struct.pack("<f", tensors["plain"][0][0, 0]))
    chance = Random(0)
    read = 0
    for _ in range(300):
        content = bytearray(original)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(header_size)
            width = chance.choice((1, 1, 4, 8))
            content[place : place + width] = chance.choice((b"\0" * width, b"\xff" * width, chance.randbytes(width)))
        if chance.random() < 0.1:
            del content[chance.randrange(len(content)) :]
        mutated = path.with_name("mutated.gguf")
        mutated.write_bytes(content)
        try:
            file = GGUFFile(mutated)
        except WeightsError:
            continue
        read += 1
        for name in file.names:
            tensor = file.tensor(name)
            tensor = tensor.dequantized(torch.float32) if isinstance(tensor, Packed) else tensor
            assert tensor.shape == file.shape(name)
            tensor.double().sum()
    assert 20 < read < 280
