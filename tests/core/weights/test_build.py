import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core.config import TINY
from mochi_core.errors import ConfigError, WeightsError
from mochi_core.latents import MOCHI_1_STATISTICS
from mochi_core.memory.blocks import block_bytes
from mochi_core.weights import build
from mochi_core.weights.checkpoint import Checkpoint
from mochi_core.weights.convert import convert

FILES = {"dit": build.TINY_DIT, "vae": build.TINY_VAE, "t5": build.TINY_T5}
LOADERS = {"dit": build.load_dit, "vae": build.load_vae, "t5": build.load_t5}
TITLES = {"dit": "a Mochi DiT", "vae": "a Mochi VAE decoder", "t5": "a T5 text encoder"}


@pytest.fixture
def changed(tmp_path):
    """`changed(part, ...)`: an embedded file with tensors or metadata changed; None takes one out."""

    def write(part, tensors=None, metadata=None, rename=lambda name: name):
        held = load_file(FILES[part]) | (tensors or {})
        held = {rename(name): tensor for name, tensor in held.items() if tensor is not None}
        kept = dict(Checkpoint(FILES[part]).metadata) | (metadata or {})
        path = tmp_path / f"{part}.safetensors"
        save_file(held, path, metadata={name: value for name, value in kept.items() if value is not None})
        return path

    return write


def refused(part, path, *messages, kind=WeightsError):
    with pytest.raises(kind) as caught:
        LOADERS[part](path)
    for message in messages:
        assert re.search(message, str(caught.value)), str(caught.value)


class TestEmbeddedFiles:
    def test_the_config_of_each_is_tiny(self):
        vae = build.load_vae(build.TINY_VAE)
        assert build.open_dit(build.TINY_DIT).config == TINY.dit
        assert vae.decoder.config == vae.encoder.config == TINY.vae
        assert build.open_t5(build.TINY_T5).config == TINY.text

    def test_all_load_in_the_dtype_of_the_file(self):
        dit, statistics = build.load_dit(build.TINY_DIT)
        vae = build.load_vae(build.TINY_VAE)
        t5 = build.load_t5(build.TINY_T5)
        assert statistics == vae.statistics != MOCHI_1_STATISTICS
        for network in (dit, vae.decoder, vae.encoder, t5):
            assert not network.training
            for parameter in network.parameters():
                assert parameter.device.type == "cpu" and not parameter.requires_grad
                assert parameter.dtype == torch.bfloat16

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
    def test_there_is_no_second_copy_of_the_weights(self, lies_in_file):
        vae = build.load_vae(build.TINY_VAE)
        for network, path in (
            (build.load_dit(build.TINY_DIT)[0], build.TINY_DIT),
            (vae.decoder, build.TINY_VAE),
            (vae.encoder, build.TINY_VAE),
            (build.load_t5(build.TINY_T5), build.TINY_T5),
        ):
            assert all(lies_in_file(parameter, path) for parameter in network.parameters())

    def test_parameter_counts_of_the_model_card(self):
        counts = [
            sum(parameter.numel() for parameter in network.parameters())
            for network in (
                build.load_dit(build.TINY_DIT)[0],
                build.load_vae(build.TINY_VAE).encoder,
                build.load_vae(build.TINY_VAE).decoder,
                build.load_t5(build.TINY_T5),
            )
        ]
        assert [round(count / 1e6, 2) for count in counts] == [3.31, 0.74, 1.37, 0.10]

    def test_in_another_dtype(self):
        dit, _ = build.load_dit(build.TINY_DIT, dtype=torch.float32)
        assert {parameter.dtype for parameter in dit.parameters()} == {torch.float32}

    def test_with_other_operations(self, marked_operations, layers_with_weights):
        dit, _ = build.load_dit(build.TINY_DIT, operations=marked_operations)
        vae = build.load_vae(build.TINY_VAE, operations=marked_operations)
        for network in (dit.blocks, vae.decoder, vae.encoder):
            assert all(hasattr(layer, "is_marked") for layer in layers_with_weights(network).values())

    def test_the_embedding_of_t5_is_one_tensor(self):
        t5 = build.load_t5(build.TINY_T5)
        assert t5.shared.weight is t5.encoder.embed_tokens.weight

    def test_the_tokenizer_fits_the_embedding(self):
        assert max(build.load_tiny_tokenizer().vocabulary().values()) < TINY.text.vocab_size


class TestNames:
    @pytest.mark.parametrize("half, absent", [("decoder", "encoder"), ("encoder", "decoder")])
    def test_a_vae_file_may_hold_one_half_with_bare_names(self, changed, half, absent):
        tensors = {name: None for name in Checkpoint(build.TINY_VAE).names if name.startswith(absent)}
        vae = build.load_vae(changed("vae", tensors, rename=lambda name: name.removeprefix(f"{half}.")))
        assert getattr(vae, absent) is None
        expected = getattr(build.load_vae(build.TINY_VAE), half).state_dict()
        actual = getattr(vae, half).state_dict()
        assert expected.keys() == actual.keys() and all(torch.equal(expected[k], actual[k]) for k in expected)

    def test_t5_files_may_hold_both_names_of_the_embedding(self, changed):
        embedding = load_file(build.TINY_T5)["shared.weight"]
        t5 = build.load_t5(changed("t5", {"encoder.embed_tokens.weight": embedding.clone()}))
        assert torch.equal(t5.shared.weight, embedding)

    def test_without_config_the_shapes_tell_the_architecture(self, changed):
        vae = build.load_vae(changed("vae", metadata={"config": None}))
        assert build.open_dit(changed("dit", metadata={"config": None})).config == TINY.dit
        assert vae.decoder.config == vae.encoder.config == TINY.vae
        assert build.open_t5(changed("t5", metadata={"config": None})).config == TINY.text

    def test_a_file_without_statistics_has_the_released_ones(self, changed):
        path = changed("dit", metadata={"latents_mean": None, "latents_std": None})
        assert build.load_dit(path)[1] == MOCHI_1_STATISTICS


@pytest.mark.parametrize("part", FILES)
class TestFilesThatDoNotFit:
    def test_missing(self, part, tmp_path):
        refused(part, tmp_path / "gone.safetensors", "gone.safetensors does not exist", "Check the path")

    @pytest.mark.parametrize("size", (0, 5, 1000, -1))
    def test_cut_short(self, part, tmp_path, size):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(FILES[part].read_bytes()[:size])
        refused(part, path, r"cut.safetensors \(\d+ bytes\) cannot be read", "download it again")

    def test_of_another_part(self, part):
        for other in FILES.keys() - {part}:
            title = re.escape(TITLES[other])
            refused(part, FILES[other], rf"is not {TITLES[part]}: it holds {title}", "load this one where it belongs")

    def test_of_another_model(self, part, tmp_path):
        path = tmp_path / "foreign.safetensors"
        save_file({"model.unet.conv.weight": torch.ones(1)}, path)
        refused(part, path, r"it holds another model \(model.unet.conv.weight\)", "Choose another file")

    def test_config_that_is_not_json(self, part, changed):
        refused(
            part, changed(part, metadata={"config": "{'depth': 4}"}), "the metadata 'config' cannot be read", "JSON"
        )

    def test_config_with_unknown_names(self, part, changed):
        config = json.loads(Checkpoint(FILES[part]).metadata["config"]) | {"zebra": 1}
        path = changed(part, metadata={"config": json.dumps(config)})
        refused(part, path, "config has zebra: .* knows only ", "Update this pack", kind=ConfigError)

    def test_config_that_is_no_object(self, part, changed):
        refused(part, changed(part, metadata={"config": "[]"}), kind=(ConfigError, WeightsError))


@pytest.mark.parametrize("part", ("dit", "vae"))
def test_statistics_that_cannot_be_read(part, changed):
    refused(part, changed(part, metadata={"latents_mean": "[1"}), "latent statistics cannot be read")


ONE_TENSOR = [
    ("dit", "blocks.1.attn.proj_y.bias", "AsymmDiT"),
    ("dit", "final_layer.linear.weight", "AsymmDiT"),
    ("vae", "decoder.blocks.2.proj.bias", "Decoder"),
    ("vae", "encoder.layers.2.layers.0.weight", "Encoder"),
    ("t5", "encoder.block.1.layer.0.SelfAttention.q.weight", "T5EncoderModel"),
]


@pytest.mark.parametrize("part, name, network", ONE_TENSOR)
def test_one_tensor_missing(changed, part, name, network):
    bare = name.removeprefix(f"{network.lower()}.")
    refused(part, changed(part, {name: None}), rf"does not fit {network}: 1 missing \({bare}\)", "incomplete")


@pytest.mark.parametrize("part, name, network", ONE_TENSOR)
def test_one_tensor_of_a_wrong_shape(changed, part, name, network):
    bare = name.removeprefix(f"{network.lower()}.")
    message = rf"does not fit {network}: 1 of a wrong shape \({bare} \(3, 1\) instead of \("
    refused(part, changed(part, {name: torch.ones(3, 1)}), message)


@pytest.mark.parametrize(
    "part, prefix, network", [("dit", "", "AsymmDiT"), ("vae", "decoder.", "Decoder"), ("t5", "", "T5")]
)
def test_one_tensor_too_many(changed, part, prefix, network):
    path = changed(part, {f"{prefix}zebra.weight": torch.ones(1)})
    refused(part, path, rf"does not fit {network}\w*: 1 unknown \(zebra.weight\)")


def test_the_config_of_another_size(changed):
    config = json.loads(Checkpoint(build.TINY_DIT).metadata["config"]) | {"depth": 5, "t5_feat_dim": 128}
    path = changed("dit", metadata={"config": json.dumps(config)})
    refused("dit", path, r"18 missing \(blocks.3.attn.proj_y.bias, .* and 10 more\)", r"8 of a wrong shape \(")


def test_a_dit_without_a_name_it_is_known_by(changed):
    refused(
        "dit", changed("dit", {"pos_frequencies": None}), "is not a Mochi DiT", "has tensors such as pos_frequencies"
    )


@pytest.mark.parametrize("name", ("encoder.layers.0.weight", "decoder.blocks.1.proj.weight"))
def test_a_vae_half_without_a_name_it_is_known_by(changed, name):
    refused("vae", changed("vae", {name: None}), name.split(".", 1)[1])


def test_a_tensor_of_neither_vae_half(changed):
    refused("vae", changed("vae", {"zebra.weight": torch.ones(1)}), "zebra.weight")


def test_weights_that_are_no_floats(changed):
    refused("dit", changed("dit", {"t5_yproj.bias": torch.ones(96, dtype=torch.int32)}), "t5_yproj.bias")


def test_statistics_for_another_number_of_channels(changed):
    refused("dit", changed("dit", metadata={"latents_mean": "[0]", "latents_std": "[1]"}), "1 ")


@pytest.mark.parametrize("kept", (1, 2, 3))
def test_a_file_with_a_part_of_the_layers(changed, kept):
    gone = {name: None for name in Checkpoint(build.TINY_DIT).names for n in range(kept, 4) if f"blocks.{n}." in name}
    path = changed("dit", gone, metadata={"config": None})
    refused(
        "dit", path, rf"ends after block {kept - 1}, .*: the last block of a Mochi DiT does not.*only a part of the"
    )


def test_a_file_with_layers_missing_in_between(changed):
    gone = {name: None for name in Checkpoint(build.TINY_DIT).names if "blocks.1." in name}
    refused("dit", changed("dit", gone, metadata={"config": None}), r"does not fit AsymmDiT: 18 missing \(blocks.1.")


# Numbers that would have a network built that is larger than any file


@pytest.mark.parametrize(
    "part, change",
    [
        ("dit", {"depth": 10**6}),
        ("dit", {"depth": 900}),
        ("vae", {"decoder": {"num_res_blocks": [0, 1, 10**6, 1, 1]}}),
        ("vae", {"encoder": {"num_res_blocks": [10**5, 0, 1, 0, 0]}}),
        ("t5", {"num_layers": 10**6}),
    ],
)
def test_a_config_of_more_layers_than_there_are_tensors(changed, part, change):
    config = json.loads(Checkpoint(FILES[part]).metadata["config"])
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    refused(part, changed(part, metadata={"config": json.dumps(config)}), r"is of \d+ layers and has \d+ tensors")


@pytest.mark.parametrize(
    "part, name",
    [("dit", "blocks.9999.zebra"), ("vae", "decoder.blocks.0.9999.zebra"), ("t5", "encoder.block.9999.zebra")],
)
def test_a_name_of_a_layer_far_away(changed, part, name):
    path = changed(part, {name: torch.ones(1)}, metadata={"config": None})
    refused(part, path, r"is of \d+ layers and has \d+ tensors")


def test_digits_that_are_no_numbers(changed):
    path = changed("dit", {"blocks.\u00b2.zebra": torch.ones(1)}, metadata={"config": None})
    refused("dit", path, "1 unknown")


def test_a_config_of_impossible_size(changed):
    config = json.loads(Checkpoint(build.TINY_VAE).metadata["config"])
    config["decoder"] |= {"base_channels": 2**20, "channel_multipliers": [2**20] * 4}
    path = changed("vae", metadata={"config": json.dumps(config)})
    refused("vae", path, "config or shapes of impossible size")


def test_a_scalar_where_the_width_is_read(changed):
    path = changed("dit", {"blocks.0.mlp_x.w2.weight": torch.ones(())}, metadata={"config": None})
    refused("dit", path, r"blocks.0.mlp_x.w2.weight \(\) instead of")


def test_an_epsilon_without_a_point(changed):
    config = json.loads(Checkpoint(build.TINY_T5).metadata["config"]) | {"layer_norm_epsilon": 1}
    assert build.load_t5(changed("t5", metadata={"config": json.dumps(config)})).config.layer_norm_epsilon == 1


@pytest.mark.parametrize(
    ("layout", "format"),
    [("diffusers", "bf16"), ("genmo", "q8_0"), ("genmo", "q4_0"), ("comfy", "fp8"), ("comfy", "fp8_scaled")],
)
def test_an_outline_is_as_large_as_the_network_and_reads_no_weight(tmp_path, monkeypatch, layout, format):
    path = tmp_path / "dit.safetensors"
    convert(build.TINY_DIT, path, layout=layout, format=format)
    network = build.load_dit(path)[0]
    opened = build.open_dit(path)
    unread = {name: dataclasses.replace(entry, load=None) for name, entry in opened.entries.items()}
    monkeypatch.setattr(build, "open_dit", lambda path: dataclasses.replace(opened, entries=unread))
    outline = build.dit_outline(path)
    assert block_bytes(outline.blocks) == block_bytes(network.blocks)
    assert [(name, p.shape, p.dtype) for name, p in outline.named_parameters()] == [
        (name, p.shape, p.dtype) for name, p in network.named_parameters()
    ]
    assert all(tensor.is_meta for tensor in (*outline.parameters(), *outline.buffers()))
