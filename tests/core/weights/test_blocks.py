import gguf
import numpy as np
import pytest
import torch

from mochi_core.errors import WeightsError
from mochi_core.weights import blocks
from mochi_core.weights.blocks import BLOCK_FORMATS, Packed, dequantize, quantize

# Where a block has its float16 numbers: random bytes there would be infinite now and then.
HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
WRITTEN = ("Q8_0", "Q4_0")


def random_rows(name, rows=24, blocks_in_row=3, seed=0):
    """Rows of random valid blocks, (rows, bytes) uint8."""
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (rows * blocks_in_row, BLOCK_FORMATS[name].bytes), dtype=np.uint8)
    for place in HALVES[name]:
        packed[:, place : place + 2] = random.normal(size=(len(packed), 1)).astype(np.float16).view(np.uint8)
    return packed.reshape(rows, -1)


def unpacked_by_gguf(rows, name):
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])


def same_bits(a, b):
    """Equal, with the signs of zeros."""
    return a.shape == b.shape and np.array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


@pytest.fixture
def few_at_once(monkeypatch):
    """A chunk that is no multiple of a row."""
    monkeypatch.setattr(blocks, "VALUES_AT_ONCE_ON_CPU", 5 * 256)


class TestFormats:
    def test_names_are_keys(self):
        assert {format.name for format in BLOCK_FORMATS.values()} == set(BLOCK_FORMATS) == set(HALVES)

    @pytest.mark.parametrize("name", BLOCK_FORMATS)
    def test_sizes_are_those_of_the_format(self, name):
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (BLOCK_FORMATS[name].values, BLOCK_FORMATS[name].bytes) == sizes


@pytest.mark.parametrize("name", BLOCK_FORMATS)
class TestDequantizing:
    def test_bits_are_those_of_gguf(self, name):
        rows = random_rows(name)
        packed = Packed(torch.from_numpy(rows), BLOCK_FORMATS[name])
        weight = packed.dequantized(torch.float32)
        assert packed.shape == weight.shape == (24, 3 * BLOCK_FORMATS[name].values)
        assert same_bits(weight, unpacked_by_gguf(rows, name))

    def test_every_bit_in_every_place(self, name):
        """Each bit of a block is on alone in its byte, so no part of the layout is left out."""
        format = BLOCK_FORMATS[name]
        scale_bytes = {half + i for half in HALVES[name] for i in (0, 1)}
        changes = [
            (place, value)
            for place in range(format.bytes)
            if place not in scale_bytes
            for value in (0, 255, *(2**bit for bit in range(8)))
        ]
        rows = np.repeat(random_rows(name, 1, 1), len(changes), axis=0)
        for row, (place, value) in zip(rows, changes):
            row[place] = value
        assert same_bits(dequantize(torch.from_numpy(rows), format, torch.float32), unpacked_by_gguf(rows, name))

    def test_chunks(self, name, few_at_once):
        rows = random_rows(name)
        weight = dequantize(torch.from_numpy(rows), BLOCK_FORMATS[name], torch.float32)
        assert same_bits(weight, unpacked_by_gguf(rows, name))

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_rounded_once(self, name, dtype, few_at_once):
        data = torch.from_numpy(random_rows(name))
        exact = torch.from_numpy(unpacked_by_gguf(data.numpy(), name))
        weight = dequantize(data, BLOCK_FORMATS[name], dtype)
        assert weight.dtype == dtype
        assert torch.equal(weight, exact.to(dtype))

    def test_rows_of_a_matrix(self, name):
        data = torch.from_numpy(random_rows(name))
        part = Packed(data[5:9], BLOCK_FORMATS[name])
        whole = Packed(data, BLOCK_FORMATS[name])
        assert torch.equal(part.dequantized(torch.float32), whole.dequantized(torch.float32)[5:9])

    def test_bytes_at_an_odd_place(self, name):
        data = torch.from_numpy(random_rows(name))
        odd = torch.cat((torch.zeros(1, dtype=torch.uint8), data.flatten()))[1:].view(data.shape)
        weight = dequantize(odd, BLOCK_FORMATS[name], torch.float32)
        assert torch.equal(weight, dequantize(data, BLOCK_FORMATS[name], torch.float32))

    def test_compiled_whole(self, name):
        """No break in the graph, which `torch.compile` of a model would otherwise have in every layer."""
        data = torch.from_numpy(random_rows(name, 2, 1))
        packed = Packed(data, BLOCK_FORMATS[name])

        def weight(data):
            return dequantize(data, BLOCK_FORMATS[name], torch.bfloat16)

        compiled = torch.compile(weight, backend="eager", fullgraph=True)
        assert torch.equal(compiled(data), packed.dequantized(torch.bfloat16))


class TestPacked:
    @pytest.mark.parametrize(
        "data",
        [
            torch.zeros(2, 35, dtype=torch.uint8),
            torch.zeros(68, dtype=torch.uint8),
            torch.zeros(2, 34, dtype=torch.int8),
        ],
        ids=["part of a block", "one dimension", "dtype"],
    )
    def test_what_are_no_rows_of_blocks(self, data):
        with pytest.raises(WeightsError, match="Q8_0 is kept as rows of bytes, 34 for each block"):
            Packed(data, BLOCK_FORMATS["Q8_0"])


def awkward_weights():
    """(rows, 64) float32 with halves, zeros, ties and opposites of the largest value, and small and large numbers."""
    random = np.random.default_rng(1)
    weight = random.normal(0, 0.02, (64, 64)).astype(np.float32)
    weight[0] = 0
    weight[1, :32] = -0.0
    weight[2] = 1
    weight[3] = -1
    weight[4] = np.tile([1, -1], 32)
    weight[5] = np.tile([-1, 1], 32)
    weight[6] = np.concatenate([random.integers(-253, 254, 63) / 2, [127]])
    weight[7] = np.concatenate([random.integers(-15, 16, 63) / 2, [-8]])
    weight[8] = np.concatenate([[0.49999997, -0.49999997, 0.5, -0.5], random.uniform(-1, 1, 59), [127]])
    weight[9] *= 1e-7
    weight[10] *= 1e-30
    weight[11] *= 1e6
    weight[12, 5] = 60000
    return weight


@pytest.mark.parametrize("name", WRITTEN)
class TestQuantizing:
    def test_bytes_are_those_of_gguf(self, name):
        weight = awkward_weights()
        packed = quantize(torch.from_numpy(weight), BLOCK_FORMATS[name])
        assert packed.shape == weight.shape
        expected = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name])
        assert np.array_equal(packed.data.numpy(), expected)

    def test_many(self, name, few_at_once):
        weight = np.random.default_rng(2).normal(0, 0.02, (500, 320)).astype(np.float32)
        packed = quantize(torch.from_numpy(weight), BLOCK_FORMATS[name])
        assert np.array_equal(packed.data.numpy(), gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name]))

    def test_zeros_stay_zeros(self, name):
        packed = quantize(torch.zeros(2, 64), BLOCK_FORMATS[name])
        assert not packed.dequantized(torch.float32).any()

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
    def test_other_dtypes_and_strides(self, name, dtype):
        weight = torch.from_numpy(awkward_weights()[13:]).to(dtype)
        expected = quantize(weight.float(), BLOCK_FORMATS[name]).data
        assert torch.equal(quantize(weight, BLOCK_FORMATS[name]).data, expected)
        assert torch.equal(quantize(weight.T.contiguous().T, BLOCK_FORMATS[name]).data, expected)

    @pytest.mark.parametrize("shape", [(4, 33), (4, 16), (64,), (2, 2, 32)])
    def test_no_whole_blocks(self, name, shape):
        with pytest.raises(WeightsError, match="must be a matrix whose columns are a multiple of 32"):
            quantize(torch.zeros(shape), BLOCK_FORMATS[name])

    @pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf"), 1e8))
    def test_what_the_scales_cannot_hold(self, name, value):
        weight = torch.ones(4, 64)
        weight[2, 40] = value
        with pytest.raises(WeightsError, match="huge or not numbers"):
            quantize(weight, BLOCK_FORMATS[name])


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMATS if name not in WRITTEN])
def test_formats_that_are_only_read(name):
    with pytest.raises(WeightsError, match=f"pack as {name}: only Q8_0 and Q4_0 can be written"):
        quantize(torch.zeros(2, 256), BLOCK_FORMATS[name])
