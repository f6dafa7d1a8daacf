"""Files in another layout or format: exact where nothing is rounded, never half a file, never much memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mochi_core.cli import app
from mochi_core.config import MOCHI_1, StagesConfig, VAEConfig
from mochi_core.dit import AsymmDiT
from mochi_core.errors import ConfigError, WeightsError
from mochi_core.vae import Decoder, Encoder
from mochi_core.weights import build, layouts, writer
from mochi_core.weights.checkpoint import Checkpoint
from mochi_core.weights.convert import FORMATS, convert
from mochi_core.weights.formats import Entry, kinds

pytestmark = pytest.mark.usefixtures("no_gradients")


def same(path, reference):
    held, expected = load_file(path), load_file(reference)
    return held.keys() == expected.keys() and all(torch.equal(held[name], expected[name]) for name in held)


# Names and rows


def diffusers_shapes(network, rules):
    """What the rules make of every name and shape, with the shapes of the pieces."""
    ours = {name: Entry(tuple(t.shape), "F32", lambda: None) for name, t in network.state_dict().items()}
    made = layouts.reversed_by(rules, ours)
    return {name: list(entry.shape) for name, entry in made.items()}


DECODER_BLOCKS, ENCODER_BLOCKS = MOCHI_1.vae.decoder.num_res_blocks[::-1], MOCHI_1.vae.encoder.num_res_blocks


def test_the_released_dit_maps_one_to_one_onto_diffusers_names(goldens):
    expected = goldens.json("manifests")["diffusers_transformer"]
    assert diffusers_shapes(AsymmDiT(device="meta"), layouts.diffusers_dit(48)) == expected


def test_the_released_vae_maps_one_to_one_onto_diffusers_names(goldens):
    expected = goldens.json("manifests")["diffusers_vae"]
    decoder = diffusers_shapes(Decoder(device="meta"), layouts.diffusers_decoder(DECODER_BLOCKS))
    encoder = diffusers_shapes(Encoder(device="meta"), layouts.diffusers_encoder(ENCODER_BLOCKS))
    held = {f"decoder.{n}": s for n, s in decoder.items()} | {f"encoder.{n}": s for n, s in encoder.items()}
    assert held == expected


@pytest.mark.parametrize(
    "network, rules",
    [
        (AsymmDiT, layouts.diffusers_dit(48)),
        (Decoder, layouts.diffusers_decoder(DECODER_BLOCKS)),
        (Encoder, layouts.diffusers_encoder(ENCODER_BLOCKS)),
    ],
)
def test_there_and_back_every_row_is_in_its_place(network, rules):
    """At full size, with a row number for each row."""
    ours = {
        name: Entry(shape[:1], "F64", lambda n=shape[0]: torch.arange(n, dtype=torch.float64))
        for name, shape in ((name, tuple(t.shape)) for name, t in network(device="meta").state_dict().items())
    }
    theirs = layouts.reversed_by(rules, ours)
    back = layouts.applied(rules, theirs)
    assert back.keys() == ours.keys()
    for name, entry in ours.items():
        assert back[name].shape == entry.shape
        assert torch.equal(back[name].load(), entry.load()), name
    joined = [rule for rule in rules if len(rule.theirs) > 1 and f"{rule.ours}.weight" in ours]
    swapped = [rule for rule in rules if rule.swap and f"{rule.ours}.weight" in ours]
    assert joined or network is Decoder
    for rule in joined:
        assert theirs[f"{rule.theirs[1]}.weight"].load()[0] == ours[f"{rule.ours}.weight"].shape[0] / 3
    for rule in swapped:
        assert theirs[f"{rule.theirs[0]}.weight"].load()[0] == ours[f"{rule.ours}.weight"].shape[0] / 2


# Round trips


@pytest.mark.parametrize(
    "layout, name", [("diffusers", "folder"), ("diffusers", "one.safetensors"), ("comfy", "one.safetensors")]
)
@pytest.mark.parametrize("file", (build.TINY_DIT, build.TINY_T5), ids=("dit", "t5"))
def test_round_trips_are_exact(file, layout, name, tmp_path):
    convert(file, tmp_path / name, layout)
    convert(tmp_path / name, tmp_path / "back.safetensors", "genmo")
    assert same(tmp_path / "back.safetensors", file)


@pytest.fixture
def even_vae(tmp_path):
    """A VAE whose halves have the same number of blocks, which is all that diffusers can say."""
    blocks = (1, 2, 1, 1, 2)
    attention = (False, True, True, True, True)
    config = VAEConfig(
        decoder=StagesConfig(32, (1, 2, 2, 1), blocks, (False,) * 5),
        encoder=StagesConfig(32, (1, 2, 1, 2), blocks, attention),
    )
    held = {}
    for prefix, network in (("decoder.", Decoder(config)), ("encoder.", Encoder(config))):
        held |= {prefix + name: torch.randn(tensor.shape) for name, tensor in network.state_dict().items()}
    save_file(held, tmp_path / "vae.safetensors", {"latents_mean": str([0.0] * 12), "latents_std": str([2.0] * 12)})
    return tmp_path / "vae.safetensors"


def test_a_vae_goes_to_diffusers_and_back(even_vae, diffusers, tmp_path):
    convert(even_vae, tmp_path / "vae", "diffusers")
    theirs = diffusers.AutoencoderKLMochi.from_pretrained(tmp_path / "vae")
    assert theirs.config.latents_std == [2.0] * 12
    convert(tmp_path / "vae", tmp_path / "back.safetensors", "comfy")
    assert same(tmp_path / "back.safetensors", even_vae)


def test_a_vae_goes_to_genmo_s_two_files_and_each_loads(tmp_path):
    written = convert(build.TINY_VAE, tmp_path, "genmo")
    assert [file.name for file in written] == ["decoder.safetensors", "encoder.safetensors"]
    decoder, encoder = (build.load_vae(file) for file in written)
    assert decoder.encoder is None and encoder.decoder is None
    assert decoder.statistics == build.load_vae(build.TINY_VAE).statistics
    assert len(Checkpoint(written[0]).names) + len(Checkpoint(written[1]).names) == len(
        Checkpoint(build.TINY_VAE).names
    )


def test_diffusers_loads_what_was_written(diffusers, tmp_path):
    from transformers import T5EncoderModel

    convert(build.TINY_DIT, tmp_path / "transformer", "diffusers")
    theirs = diffusers.MochiTransformer3DModel.from_pretrained(tmp_path / "transformer")
    held = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, held[name].float()) for name, tensor in theirs.state_dict().items())
    convert(build.TINY_T5, tmp_path / "t5", "diffusers")
    t5 = T5EncoderModel.from_pretrained(tmp_path / "t5")
    assert torch.equal(t5.shared.weight, load_file(build.TINY_T5)["shared.weight"].to(t5.dtype))


@pytest.fixture
def all_in_one(tmp_path):
    prefixes = ("model.diffusion_model.", "vae.", "text_encoders.t5xxl.transformer.")
    files = (build.TINY_DIT, build.TINY_VAE, build.TINY_T5)
    held = {prefix + name: t for prefix, file in zip(prefixes, files) for name, t in load_file(file).items()}
    save_file(held, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors"


def test_an_all_in_one_file_apart_and_together_again(all_in_one, tmp_path):
    written = convert(all_in_one, tmp_path / "apart", "genmo")
    assert sorted(file.name for file in written) == [
        "decoder.safetensors", "dit.safetensors", "encoder.safetensors", "t5.safetensors"
    ]  # fmt: skip
    assert same(tmp_path / "apart" / "dit.safetensors", build.TINY_DIT)
    convert(all_in_one, tmp_path / "vae.safetensors", "comfy", part="vae")
    assert same(tmp_path / "vae.safetensors", build.TINY_VAE)
    convert(all_in_one, tmp_path / "again.safetensors", "comfy")
    assert same(tmp_path / "again.safetensors", all_in_one)
    convert(all_in_one, tmp_path / "small.safetensors", "comfy", "fp8_scaled")
    dit, vae, t5 = (load(tmp_path / "small.safetensors") for load in (build.load_dit, build.load_vae, build.load_t5))
    assert dit[0].config.depth == 4 and vae.encoder is not None and t5.config.num_layers == 2


# Formats


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_holds_what_it_says(format, tmp_path):
    convert(build.TINY_DIT, tmp_path / "file.safetensors", "comfy", format)
    file = build.open_dit(tmp_path / "file.safetensors")
    held = kinds(file.entries)
    large = sum(name.startswith("blocks.") and len(entry.shape) == 2 for name, entry in file.entries.items())
    names = {"fp8": "F8_E4M3", "fp8_scaled": "F8_E4M3 scaled", "q8_0": "Q8_0", "q4_0": "Q4_0"}
    if format in names:
        assert held == {names[format]: large, "BF16": len(file.entries) - large}
    else:
        assert held == {{"fp16": "F16", "fp32": "F32"}.get(format, "BF16"): len(file.entries)}
    assert file.statistics == build.open_dit(build.TINY_DIT).statistics
    # what is kept again is kept exactly
    convert(tmp_path / "file.safetensors", tmp_path / "again.safetensors", "comfy", "keep")
    assert same(tmp_path / "again.safetensors", tmp_path / "file.safetensors")


def test_quantised_weights_become_floats_again(tmp_path):
    for format, allowed in (("q8_0", 0.01), ("fp8_scaled", 0.04)):
        convert(build.TINY_DIT, tmp_path / f"{format}.safetensors", "comfy", format)
        convert(tmp_path / f"{format}.safetensors", tmp_path / f"{format}_back.safetensors", "genmo", "bf16")
        back, original = load_file(tmp_path / f"{format}_back.safetensors"), load_file(build.TINY_DIT)
        assert back.keys() == original.keys()
        off = back["blocks.0.attn.qkv_x.weight"].float() - original["blocks.0.attn.qkv_x.weight"].float()
        assert 0 < off.norm() / original["blocks.0.attn.qkv_x.weight"].float().norm() < allowed


def test_a_gguf_can_be_kept_where_safetensors_can_hold_its_types(tmp_path):
    import gguf

    def write(kind):
        made = gguf.GGUFWriter(tmp_path / "file.gguf", "mochi")
        type_ = gguf.GGMLQuantizationType[kind]
        for name, tensor in load_file(build.TINY_DIT).items():
            large = name.startswith("blocks.") and tensor.ndim == 2
            array = tensor.float().numpy()
            made.add_tensor(
                name, gguf.quants.quantize(array, type_) if large else array, raw_dtype=type_ if large else None
            )
        made.write_header_to_file()
        made.write_kv_data_to_file()
        made.write_tensors_to_file()
        made.close()
        return tmp_path / "file.gguf"

    convert(write("Q8_0"), tmp_path / "kept.safetensors")
    assert "Q8_0" in kinds(Checkpoint(tmp_path / "kept.safetensors").entries)
    with pytest.raises(WeightsError, match=r"holds Q5_0: these cannot be kept in a safetensors file\. Choose a format"):
        convert(write("Q5_0"), tmp_path / "other.safetensors")


def test_scaled_weights_keep_all_that_belongs_to_them(tmp_path):
    convert(build.TINY_DIT, tmp_path / "one.safetensors", "comfy", "fp8_scaled")
    held, layer = load_file(tmp_path / "one.safetensors"), "blocks.1.attn.qkv_x"
    rows = held[f"{layer}.scale_weight"].repeat(held[f"{layer}.weight"].shape[0], 1)
    held |= {f"{layer}.scale_weight": rows, f"{layer}.scale_input": torch.tensor(5.0)}
    held["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(held, tmp_path / "two.safetensors")
    for format in ("keep", "fp8_scaled"):
        convert(tmp_path / "two.safetensors", tmp_path / f"{format}.safetensors", "comfy", format)
        kept = Checkpoint(tmp_path / f"{format}.safetensors").tensor(f"{layer}.weight")
        assert kept.scale.shape == rows.shape and kept.input_scale == 5 and kept.wide_product
        assert same(tmp_path / f"{format}.safetensors", tmp_path / "two.safetensors")


def test_values_that_a_format_cannot_hold_are_refused(tmp_path):
    held = load_file(build.TINY_DIT)
    held["blocks.0.mlp_x.w1.weight"][0, 0] = 1e6
    save_file(held, tmp_path / "large.safetensors")
    held["blocks.0.mlp_x.w1.weight"][0, 0] = float("nan")
    save_file(held, tmp_path / "nan.safetensors")
    refused("float16 ends at 65504", tmp_path / "large.safetensors", tmp_path / "x.safetensors", format="fp16")
    for format in ("fp8", "fp8_scaled", "q8_0"):
        refused("not (finite|numbers)", tmp_path / "nan.safetensors", tmp_path / "x.safetensors", format=format)
    assert not (tmp_path / "x.safetensors").exists()


# What is refused, and what fails


def refused(message, *arguments, kind=WeightsError, **options):
    with pytest.raises(kind, match=message):
        convert(*arguments, **options)


def test_refusals(all_in_one, tmp_path):
    refused("layout is 'flux': it must be one of", build.TINY_DIT, tmp_path / "x.safetensors", "flux")
    refused("format is 'int3': it must be one of", build.TINY_DIT, tmp_path / "x.safetensors", "comfy", "int3")
    refused("part is 'unet'", build.TINY_DIT, tmp_path / "x.safetensors", part="unet")
    refused("is not a T5 text encoder: it holds a Mochi DiT", build.TINY_DIT, tmp_path / "x.safetensors", part="t5")
    refused("nothing reads such a file", build.TINY_DIT, tmp_path / "x", "diffusers", "q8_0")
    refused("genmo's layout has a file for each: .*|Give a folder", all_in_one, tmp_path / "x.safetensors", "genmo")
    refused("diffusers has a folder for each", all_in_one, tmp_path / "x.safetensors", "diffusers", part=None)
    refused("residual blocks: diffusers has one number", build.TINY_VAE, tmp_path / "x", "diffusers", kind=ConfigError)
    assert sorted(tmp_path.iterdir()) == [all_in_one]


def test_nothing_is_overwritten_unasked_and_never_the_input(tmp_path):
    target = tmp_path / "dit.safetensors"
    convert(build.TINY_DIT, target)
    refused("is there already: nothing is overwritten unasked", build.TINY_DIT, target)
    convert(build.TINY_DIT, target, format="fp16", overwrite=True)
    assert "F16" in kinds(Checkpoint(target).entries)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    refused("config.json is there already", build.TINY_DIT, tmp_path / "folder", "diffusers")
    refused("is the input: it is read while it is written", target, target, overwrite=True)


@pytest.mark.parametrize("cut", (0.5, 0.99))
def test_a_truncated_input_writes_nothing(cut, tmp_path):
    content = build.TINY_DIT.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: int(len(content) * cut)])
    refused("cannot be read", tmp_path / "cut.safetensors", tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["cut.safetensors"]


def test_a_failure_in_the_middle_leaves_no_half_file_and_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "dit.safetensors"
    convert(build.TINY_DIT, target, format="fp16")
    before = target.read_bytes()

    def fail(name, done, total):
        if done == 40:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        convert(build.TINY_DIT, target, overwrite=True, progress=fail)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """A file of 40 tensors of 8 MB each, read and quantised in a process that may grow by a tenth of it."""
    script = f"""
import resource, sys, torch
from mochi_core.weights import writer
from pathlib import Path
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
from mochi_core.weights.formats import Entry
from mochi_core.weights import convert as c
tensors = [Entry((2048, 2048), "BF16", lambda: torch.randn(2048, 2048).bfloat16()) for _ in range(40)]
outputs = [o for i, e in enumerate(tensors) for o in c._tensors(f"blocks.{{i}}.w.weight", e, "q8_0")]
outputs[0].load()
before = peak()
writer.write_safetensors(Path({str(tmp_path / "out")!r}), outputs, {{}})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    size = (tmp_path / "out").stat().st_size / 2**20
    assert size > 160 and float(done.stdout) < 60


def test_the_writer_s_file_is_a_safetensors_file(tmp_path):
    held = {"b": torch.randn(3, 5), "a": torch.ones(7, dtype=torch.uint8), "c": torch.randn(2).to(torch.float8_e4m3fn)}
    kind = {"a": "U8", "b": "F32", "c": "F8_E4M3"}
    outputs = [writer.Output(name, kind[name], tuple(t.shape), lambda t=t: t) for name, t in held.items()]
    writer.write_safetensors(tmp_path / "deep" / "file", outputs, {"k": "v"})
    with safe_open(tmp_path / "deep" / "file", "pt") as file:
        assert file.metadata() == {"k": "v"}
    read = load_file(tmp_path / "deep" / "file")
    assert all(torch.equal(read[name].view(torch.uint8), t.view(torch.uint8)) for name, t in held.items())


# The command


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_converts_and_inspects(tmp_path):
    done = run("convert", build.TINY_DIT, tmp_path / "dit.safetensors", "--format", "q8_0")
    assert done.exit_code == 0 and "dit.safetensors (3." in done.stdout
    done = run("inspect", tmp_path / "dit.safetensors")
    assert done.exit_code == 0 and "a Mochi DiT" in done.stdout and "Q8_0" in done.stdout
    assert json.loads(Checkpoint(tmp_path / "dit.safetensors").metadata["latents_std"])


@pytest.mark.parametrize("command", ("convert", "inspect"))
def test_the_command_says_what_is_wrong(command, tmp_path):
    arguments = (tmp_path / "gone", tmp_path / "out.safetensors")
    done = run(command, *arguments[: 2 if command == "convert" else 1])
    assert done.exit_code == 1 and "gone does not exist or is no file" in done.stderr and "Traceback" not in done.output
