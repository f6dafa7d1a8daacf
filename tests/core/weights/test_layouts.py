from pathlib import Path
from types import SimpleNamespace

import pytest

from mochi_core.errors import WeightsError
from mochi_core.weights import layouts
from mochi_core.weights.formats import Entry

DIT = ("pos_frequencies", "t5_yproj.weight", "blocks.0.attn.qkv_x.weight")
VAE = (
    "decoder.blocks.0.0.weight",
    "decoder.blocks.1.proj.weight",
    "encoder.layers.0.weight",
    "encoder.output_norm.weight",
)


def holding(*names):
    return SimpleNamespace(names=names, path=Path("file.safetensors"), metadata={})


@pytest.mark.parametrize(
    "part, names, prefix",
    [
        (layouts.DIT, DIT, ""),
        (layouts.DECODER, VAE, "decoder."),
        (layouts.ENCODER, VAE, "encoder."),
        (layouts.DECODER, ("blocks.0.0.weight", "blocks.1.proj.weight"), ""),
        (layouts.ENCODER, ("layers.0.weight", "output_norm.weight"), ""),
        (layouts.T5, ("shared.weight", "encoder.final_layer_norm.weight"), ""),
    ],
)
def test_a_part_is_known_by_its_names(part, names, prefix):
    assert layouts.find(holding(*names, "something.else"), part).prefix == prefix


@pytest.mark.parametrize("names", (DIT, VAE, ("shared.weight", "encoder.final_layer_norm.weight")))
def test_parts_are_not_mistaken_for_each_other(names):
    found = [part.title for part in layouts.PARTS if part.found_in(names) is not None]
    assert len(found) == (2 if names is VAE else 1)


def test_the_error_says_what_the_file_holds():
    message = (
        r"^file.safetensors is not a Mochi DiT: it holds a Mochi VAE decoder and a Mochi VAE encoder: a Mochi "
        r"DiT has tensors such as pos_frequencies, .*\. Choose another file, or load this one where it belongs\.$"
    )
    with pytest.raises(WeightsError, match=message):
        layouts.find(holding(*VAE), layouts.DIT)


def test_the_error_shows_names_of_a_foreign_file():
    with pytest.raises(WeightsError, match=r"it holds another model \(unet.a, unet.b\): .*Choose another file\.$"):
        layouts.find(holding("unet.a", "unet.b"), layouts.DIT)


def test_a_file_without_tensors():
    with pytest.raises(WeightsError, match=r"it holds another model \(no tensors\)"):
        layouts.find(holding(), layouts.T5)


@pytest.mark.parametrize(
    "shapes",
    [((4, 4), (4, 4), (4, 8)), ((4, 4), (8, 4), (4, 4)), ((4, 4), (4,), (4, 4)), ((), (), ())],
    ids=str,
)
def test_pieces_of_a_weight_must_be_alike(shapes):
    rule = layouts.Rule("attn.qkv_x", ("to_q", "to_k", "to_v"))
    theirs = {
        f"{name}.weight": Entry(shape, "F32", lambda: pytest.fail("nothing is read"))
        for name, shape in zip(rule.theirs, shapes)
    }
    with pytest.raises(WeightsError, match=r"^to_q.weight, to_k.weight, to_v.weight have shapes \("):
        layouts.applied((rule,), theirs)


def test_a_number_has_no_halves_to_swap():
    rule = layouts.Rule("final_layer.mod", ("norm_out.linear",), swap=True)
    entry = Entry((), "F32", lambda: pytest.fail("nothing is read"))
    with pytest.raises(WeightsError, match=r"norm_out.linear.weight have shapes \(\)"):
        layouts.applied((rule,), {"norm_out.linear.weight": entry})
