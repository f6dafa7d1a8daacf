"""Weights and what belongs to them in a file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mochi_core.errors import WeightsError
from mochi_core.weights.checkpoint import Checkpoint
from mochi_core.weights.formats import Scaled


def conf(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.fixture
def opened(tmp_path):
    """`opened(tensors)`: a safetensors file with them."""

    def write(tensors):
        save_file(tensors, tmp_path / "weights.safetensors")
        return Checkpoint(tmp_path / "weights.safetensors")

    return write


WEIGHT = torch.ones(4, 2).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 1)])
def test_one_scale_or_one_for_each_row(opened, shape):
    weight = opened({"a.weight": WEIGHT, "a.scale_weight": torch.full(shape, 3.0)}).tensor("a.weight")
    assert isinstance(weight, Scaled)
    assert torch.equal(weight.dequantized(torch.float32), torch.full((4, 2), 3.0))


@pytest.mark.parametrize(
    "weight, scale",
    [
        (WEIGHT, torch.ones(2)),
        (WEIGHT, torch.ones(0)),
        (WEIGHT, torch.ones(4, 2)),
        (WEIGHT, torch.ones((), dtype=torch.int32)),
        (torch.ones(4, 2, dtype=torch.int8), torch.ones(())),
        # a scale for each of these would make a matrix of a vector, and of a small one a large one
        (torch.ones(4), torch.ones(4)),
        (torch.ones(4, 2, 3, 3), torch.ones(4)),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
def test_scales_that_do_not_fit(opened, weight, scale):
    with pytest.raises(WeightsError, match=r"a.weight in .* with a scale of .*: .*one scale, or one for each row"):
        opened({"a.weight": weight, "a.weight_scale": scale})


@pytest.mark.parametrize("scale", (torch.ones(2), torch.ones(0), torch.ones((), dtype=torch.int64)))
def test_scales_of_activations_that_do_not_fit(opened, scale):
    with pytest.raises(WeightsError, match=r"has a.input_scale of shape .*: activations have one scale"):
        opened({"a.weight": WEIGHT, "a.weight_scale": torch.ones(()), "a.input_scale": scale})


def test_the_format_of_a_layer(opened):
    held = {"a.weight": WEIGHT, "a.weight_scale": torch.ones(())}
    text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    assert opened(held | {"a.comfy_quant": conf(text)}).tensor("a.weight").wide_product
    with pytest.raises(WeightsError, match=r"has a of format 'nvfp4'"):
        opened(held | {"a.comfy_quant": conf('{"format": "nvfp4"}')})


@pytest.mark.parametrize(
    "tensor",
    (
        conf("{"),
        conf("[]"),
        conf("[" * 60_000),
        conf("1" * 5000),
        conf('{"format": []}'),
        torch.tensor(2**40),
        torch.ones(9),
    ),
    ids=("cut", "list", "deep", "long", "list inside", "number", "floats"),
)
def test_formats_that_cannot_be_read(opened, tensor):
    with pytest.raises(WeightsError, match=r"unreadable comfy_quant"):
        opened({"a.weight": WEIGHT, "a.weight_scale": torch.ones(()), "a.comfy_quant": tensor})


def test_a_scale_is_applied_once_however_often_a_layer_is_used(opened):
    """A weight in float32 needs no cast, and must not be changed in place."""
    weight = opened({"a.weight": torch.ones(4, 2), "a.scale_weight": torch.tensor(2.0)}).tensor("a.weight")
    for _ in range(3):
        assert torch.equal(weight.dequantized(torch.float32), torch.full((4, 2), 2.0))


@pytest.mark.parametrize("scale", (float("nan"), float("inf"), -1.0))
def test_scales_that_are_no_scales(opened, scale):
    checkpoint = opened({"a.weight": WEIGHT, "a.scale_weight": torch.tensor(scale)})
    with pytest.raises(WeightsError, match=r"scales must be finite and not negative"):
        checkpoint.tensor("a.weight")


def test_a_scale_for_each_column_is_not_taken_for_one_for_each_row(opened):
    square = torch.ones(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(WeightsError, match=r"with a scale of shape \(1, 4\)"):
        opened({"a.weight": square, "a.scale_weight": torch.ones(1, 4)})


def test_two_scales_or_a_format_without_one(opened):
    with pytest.raises(WeightsError, match=r"has 2 scales for a.weight"):
        opened({"a.weight": WEIGHT, "a.scale_weight": torch.ones(()), "a.weight_scale": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"has 0 scales for a.weight"):
        opened({"a.weight": WEIGHT, "a.comfy_quant": conf('{"format": "float8_e4m3fn"}')})


def test_whole_numbers_among_the_pieces_of_a_weight_are_seen():
    from mochi_core.weights import layouts
    from mochi_core.weights.formats import Entry

    pieces = {"q": "BF16", "k": "U8", "v": "BF16"}
    entries = {f"{name}.weight": Entry((2, 2), kind, lambda: torch.ones(2, 2)) for name, kind in pieces.items()}
    made = layouts.applied((layouts.Rule("qkv", ("q", "k", "v")),), entries)
    assert made["qkv.weight"].kind == "U8"
