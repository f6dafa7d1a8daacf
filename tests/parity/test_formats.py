"""One small model in every layout and format, written by others where others can, gives the same numbers."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_core.config import TINY, DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.errors import WeightsError
from mochi_core.weights import build
from mochi_core.weights.quantized import QuantizedLinear

pytestmark = pytest.mark.usefixtures("no_gradients")

# Relative RMS of the DiT's output against float32 weights, in float32: what each format costs on the tiny model, with
# a third to spare. docs/formats.md has the figures themselves.
ALLOWED = {"bf16": 0, "fp16": 1e-3, "fp8": 0.07, "fp8_scaled": 0.07, "q8_0": 0.012, "q4_0": 0.18}

COMFY_PREFIXES = ("model.diffusion_model.", "vae.", "text_encoders.t5xxl.transformer.")


@pytest.fixture(scope="module")
def weights():
    """The tiny DiT's weights, exactly as bfloat16 holds them."""
    return load_file(build.TINY_DIT)


@pytest.fixture(scope="module")
def metadata():
    with safe_open(build.TINY_DIT, "pt") as file:
        return {name: value for name, value in file.metadata().items() if name.startswith("latents_")}


def predicted(dit):
    """What a DiT makes of the same inputs, always."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 12, 2, 8, 8, generator=generator)
    features = torch.randn(2, 256, TINY.dit.text_feature_dim, generator=generator)
    mask = torch.arange(256)[None] < torch.tensor([[9], [14]])
    return dit(latents, torch.tensor([0.7, 0.3]), features, mask)


@pytest.fixture(scope="module")
def expected(weights):
    dit = AsymmDiT(TINY.dit, device="meta")
    dit.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    with torch.no_grad():
        return predicted(dit)


def relative_error(actual, expected):
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def loaded(path):
    dit, statistics = build.load_dit(path, dtype=torch.float32)
    assert statistics == build.load_dit(build.TINY_DIT)[1]
    return dit


def quantized_layers(dit):
    return [name for name, layer in dit.named_modules() if isinstance(layer, QuantizedLinear)]


def large(name, tensor):
    """The weights that are quantised in files: the matrices inside the blocks."""
    return name.startswith("blocks.") and tensor.ndim == 2


# Layouts


@pytest.mark.parametrize("prefix", ("", "model.diffusion_model.", "diffusion_model."))
def test_prefixes(prefix, weights, metadata, expected, tmp_path):
    save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "file", metadata)
    assert torch.equal(predicted(loaded(tmp_path / "file")), expected)


@pytest.fixture(scope="module")
def all_in_one(weights, metadata, tmp_path_factory):
    """DiT, VAE and T5 in one file, as ComfyUI saves checkpoints."""
    parts = (weights, load_file(build.TINY_VAE), load_file(build.TINY_T5))
    held = {prefix + name: tensor for prefix, part in zip(COMFY_PREFIXES, parts) for name, tensor in part.items()}
    held["text_encoders.t5xxl.logit_scale"] = torch.tensor(4.6)
    path = tmp_path_factory.mktemp("all") / "mochi.safetensors"
    save_file(held, path, metadata)
    return path


def test_loaders_pick_their_part_of_an_all_in_one_file(all_in_one, expected):
    assert torch.equal(predicted(loaded(all_in_one)), expected)
    vae, reference = build.load_vae(all_in_one), build.load_vae(build.TINY_VAE)
    t5, reference_t5 = build.load_t5(all_in_one), build.load_t5(build.TINY_T5)
    assert vae.statistics == reference.statistics
    for ours, theirs in ((vae.decoder, reference.decoder), (vae.encoder, reference.encoder), (t5, reference_t5)):
        expected_weights = theirs.state_dict()
        assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in ours.state_dict().items())


# diffusers' own conversion of genmo's names counts on 48 blocks; its feed-forward width agrees with ours at 96.
DEEP = DiTConfig(depth=48, heads=3, visual_dim=96, text_dim=96, text_feature_dim=64)


@pytest.fixture(scope="module")
def deep():
    """A DiT of 48 thin blocks with random weights."""
    dit = AsymmDiT(DEEP)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        return dit.eval(), predicted(dit)


@pytest.fixture(scope="module")
def diffusers_folder(diffusers, deep, tmp_path_factory):
    """`diffusers_folder(shard_size)`: the deep DiT converted, loaded and saved by diffusers."""
    from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers as converted

    network = diffusers.MochiTransformer3DModel(
        num_attention_heads=DEEP.heads,
        attention_head_dim=DEEP.head_dim,
        num_layers=DEEP.depth,
        pooled_projection_dim=DEEP.text_dim,
        text_embed_dim=DEEP.text_feature_dim,
    )
    network.load_state_dict(converted(dict(deep[0].state_dict())))

    def save(shard_size):
        folder = tmp_path_factory.mktemp("diffusers") / "transformer"
        network.save_pretrained(folder, max_shard_size=shard_size)
        return folder

    return save


@pytest.mark.parametrize("shard_size", ("1GB", "9MB"))
def test_a_diffusers_folder(shard_size, diffusers_folder, deep):
    folder = diffusers_folder(shard_size)
    assert len(list(folder.glob("*.safetensors"))) == (1 if shard_size == "1GB" else 7)
    dit, _ = build.load_dit(folder)
    assert dit.config == DEEP
    assert torch.equal(predicted(dit), deep[1])


def test_a_diffusers_single_file_without_its_config(diffusers_folder, deep, tmp_path):
    (file,) = diffusers_folder("1GB").glob("*.safetensors")
    file.rename(tmp_path / "FastMochi.safetensors")
    assert torch.equal(predicted(build.load_dit(tmp_path / "FastMochi.safetensors")[0]), deep[1])


def test_a_shard_of_the_index_that_is_missing_or_elsewhere(diffusers_folder):
    folder = diffusers_folder("9MB")
    (index,) = folder.glob("*.index.json")
    first = sorted(folder.glob("*.safetensors"))[0]
    content = index.read_text()
    index.write_text(content.replace(first.name, f"../{first.name}"))
    with pytest.raises(WeightsError, match=r"names the file '../.*, which is not in its folder"):
        build.load_dit(folder)
    index.write_text(content)
    first.unlink()
    with pytest.raises(WeightsError, match="which is not in its folder"):
        build.load_dit(folder)


def test_diffusers_vae(diffusers, tmp_path):
    """Its encoder, and the end of what it decodes: at the beginning diffusers differs from the reference."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 64, 32, 64),
        decoder_block_out_channels=(32, 32, 96, 64),
        layers_per_block=(1, 1, 2, 2, 3),
        latents_mean=(0.5,) * 12,
    ).eval()
    theirs.save_pretrained(tmp_path / "vae")
    vae = build.load_vae(tmp_path / "vae")
    assert vae.statistics.mean == (0.5,) * 12
    assert vae.decoder.config.decoder.num_res_blocks == vae.encoder.config.encoder.num_res_blocks == (1, 1, 2, 2, 3)
    clip = torch.rand(1, 3, 13, 32, 32) * 2 - 1
    assert (vae.encoder(clip).mean - theirs.encode(clip).latent_dist.mean).abs().max() < 1e-4
    latents = torch.randn(1, 12, 9, 2, 2)
    decoded, their_decoded = vae.decoder(latents), theirs.decode(latents).sample
    assert decoded.shape == their_decoded.shape and decoded.std() > 0.1
    assert (decoded - their_decoded)[:, :, -6:].abs().max() < 1e-4


def test_a_pipeline_folder_serves_each_loader(diffusers_folder, diffusers, deep, tmp_path):
    diffusers_folder("1GB").rename(tmp_path / "transformer")
    torch.manual_seed(0)
    small = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_std=(2.0,) * 12,
    )
    small.save_pretrained(tmp_path / "vae")
    build.load_t5(build.TINY_T5).save_pretrained(tmp_path / "text_encoder")
    dit, statistics = build.load_dit(tmp_path)
    assert torch.equal(predicted(dit), deep[1]) and statistics.std == (2.0,) * 12
    assert build.load_vae(tmp_path).encoder is not None
    assert build.load_t5(tmp_path).config.d_model == TINY.text.d_model


# Formats


def test_float16(weights, metadata, expected, tmp_path):
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "file", metadata)
    assert relative_error(predicted(loaded(tmp_path / "file")), expected) < ALLOWED["fp16"]


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e5m2))
def test_float8_cast(dtype, weights, metadata, expected, tmp_path):
    held = {name: tensor.to(dtype) if large(name, tensor) else tensor for name, tensor in weights.items()}
    save_file(held, tmp_path / "file", metadata)
    dit = loaded(tmp_path / "file")
    assert len(quantized_layers(dit)) == sum(large(*item) for item in weights.items())
    exact = AsymmDiT(TINY.dit, device="meta")
    exact.load_state_dict({name: tensor.float() for name, tensor in held.items()}, assign=True)
    assert torch.equal(predicted(dit), predicted(exact))
    if dtype == torch.float8_e4m3fn:
        assert relative_error(predicted(dit), expected) < ALLOWED["fp8"]


def test_every_tensor_in_float8_biases_and_norms_too(weights, metadata, expected, tmp_path):
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in weights.items()}, tmp_path / "file", metadata)
    assert relative_error(predicted(loaded(tmp_path / "file")), expected) < 2 * ALLOWED["fp8"]


HOST_QUANTISER = """
import sys
comfyui, source, target = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv[1:] = ["--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import load_file, save_file

held = {}
for name, tensor in load_file(source).items():
    if not (name.startswith("blocks.") and tensor.ndim == 2):
        held[name] = tensor
        continue
    scale = tensor.float().abs().max() / 448
    made = QuantizedTensor.from_float(tensor.float(), LAYOUT, scale=scale)
    held[name] = made._qdata
    held[name.replace(".weight", ".scale_weight")] = scale
held["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
save_file(held, target)
"""


@pytest.fixture(scope="module")
def host_scaled(comfyui_path, weights, metadata, tmp_path_factory):
    """The tiny DiT in scaled 8-bit floats, quantised by the host's own code."""
    folder = tmp_path_factory.mktemp("scaled")
    save_file(weights, folder / "in")
    layout = '"TensorCoreFP8Layout"'
    script = HOST_QUANTISER.replace("LAYOUT", layout)
    command = [sys.executable, "-c", script, comfyui_path, folder / "in", folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=comfyui_path)
    assert done.returncode == 0, done.stderr
    save_file(load_file(folder / "out"), folder / "scaled", metadata)
    return folder / "scaled"


def test_float8_scaled_by_the_host(host_scaled, expected):
    dit = loaded(host_scaled)
    assert relative_error(predicted(dit), expected) < ALLOWED["fp8_scaled"]
    layer = dit.blocks[0].attn.qkv_x
    held = load_file(host_scaled)
    by_hand = held["blocks.0.attn.qkv_x.weight"].float() * held["blocks.0.attn.qkv_x.scale_weight"]
    assert torch.equal(layer.dequantized(torch.float32), by_hand)


def test_float8_scaled_as_newer_hosts_name_it(host_scaled, metadata, tmp_path):
    conf = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    held = load_file(host_scaled)
    del held["scaled_fp8"]
    newer = {name.replace("scale_weight", "weight_scale"): tensor for name, tensor in held.items()}
    newer |= {name.replace("scale_weight", "comfy_quant"): conf.clone() for name in held if "scale_weight" in name}
    save_file(newer, tmp_path / "file", metadata)
    assert torch.equal(predicted(loaded(tmp_path / "file")), predicted(loaded(host_scaled)))


def test_a_quantisation_that_is_not_known_is_refused(host_scaled, tmp_path):
    conf = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    held = load_file(host_scaled)
    held["blocks.0.attn.qkv_x.comfy_quant"] = conf
    save_file(held, tmp_path / "file")
    with pytest.raises(WeightsError, match="of format 'nvfp4': float8_e4m3fn and float8_e5m2 are read"):
        build.load_dit(tmp_path / "file")


@pytest.mark.parametrize("kind", ("Q8_0", "Q4_0"))
def test_packed_in_safetensors(kind, weights, metadata, expected, tmp_path):
    held = {}
    for name, tensor in weights.items():
        if large(name, tensor):
            packed = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[kind])
            held[name.replace(".weight", f".{kind}_qweight")] = torch.from_numpy(packed)
        else:
            held[name] = tensor
    save_file(held, tmp_path / "file", metadata)
    dit = loaded(tmp_path / "file")
    assert quantized_layers(dit)
    assert relative_error(predicted(dit), expected) < ALLOWED[kind.lower()]


def random_blocks(kind, shape, generator):
    """Valid K-quant blocks: any bytes will do but for the half-precision scales, which must be small and finite."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = generator.integers(0, 256, (shape[0], shape[1] // values, size), dtype=np.uint8)
    places = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}[kind]
    for place in places:
        scales = generator.uniform(0.5e-4, 2e-4, blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(path, weights, packed, metadata=()):
    """A GGUF by gguf's own writer: `packed(name, array)` gives bytes and their type, or None for floats."""
    writer = gguf.GGUFWriter(path, "mochi")
    for key, value in dict(metadata).items():
        writer.add_string(key, value)
    for name, tensor in weights.items():
        array = tensor.float().numpy()
        made = packed(name, array)
        if made is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, made[0], raw_dtype=made[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ("Q8_0", "Q4_0", "Q5_1", "BF16"))
def test_gguf(kind, weights, metadata, expected, tmp_path):
    """A quantised timestep embedding included; types that do not stay packed become floats at load."""
    type_ = gguf.GGMLQuantizationType[kind]

    def packed(name, array):
        if (large(name, weights[name]) or name.startswith("t_embedder")) and array.ndim == 2:
            return gguf.quants.quantize(array, type_), type_
        return None

    dit = loaded(write_gguf(tmp_path / "file", weights, packed, metadata))
    assert bool(quantized_layers(dit)) == (kind in ("Q8_0", "Q4_0"))
    allowed = {"Q8_0": ALLOWED["q8_0"], "Q4_0": ALLOWED["q4_0"], "Q5_1": 0.12, "BF16": 0}[kind]
    assert relative_error(predicted(dit), expected) <= allowed


@pytest.mark.parametrize("kind", ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"))
def test_gguf_of_k_quants_equals_their_floats(kind, deep, tmp_path):
    """No package here writes them: random blocks, against the same network with gguf's own floats."""
    wide = DiTConfig(depth=2, heads=4, visual_dim=256, text_dim=256, text_feature_dim=256)
    dit = AsymmDiT(wide)
    generator, type_ = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    weights = {name: torch.randn(p.shape) * 0.05 for name, p in dit.named_parameters()}
    blocks = {
        name: random_blocks(kind, tensor.shape, generator)
        for name, tensor in weights.items()
        if name.endswith(".weight") and tensor.ndim == 2
    }
    floats = {name: torch.from_numpy(gguf.quants.dequantize(data, type_)) for name, data in blocks.items()}
    dit.load_state_dict(weights | floats)
    assert "t_embedder.mlp.0.weight" in blocks

    write_gguf(tmp_path / "file", weights, lambda name, _: (blocks[name], type_) if name in blocks else None)
    held, _ = build.load_dit(tmp_path / "file", dtype=torch.float32)
    assert held.config == wide
    assert len(quantized_layers(held)) == (len(blocks) if kind in ("Q6_K", "Q5_K", "Q4_K") else 0)
    inputs = (torch.randn(1, 12, 1, 4, 4), torch.tensor([0.5]), torch.randn(1, 8, 256), torch.ones(1, 8))
    assert (held(*inputs) - dit(*inputs)).abs().max() < 1e-5
    unpacked, _ = build.load_dit(tmp_path / "file", dtype=torch.float32, keep_quantized=False)
    assert not quantized_layers(unpacked) and torch.equal(unpacked(*inputs), held(*inputs))


def test_quantised_files_compute_in_bfloat16_unless_told(weights, metadata, tmp_path):
    type_ = gguf.GGMLQuantizationType.Q8_0
    packed = lambda name, array: (gguf.quants.quantize(array, type_), type_) if large(name, weights[name]) else None  # noqa: E731
    dit, _ = build.load_dit(write_gguf(tmp_path / "file", weights, packed, metadata))
    assert {parameter.dtype for parameter in dit.parameters()} == {torch.bfloat16}


def test_files_of_mixed_dtypes_are_made_one(weights, metadata, expected, tmp_path):
    held = {name: tensor.float() if "norm" in name or "bias" in name else tensor for name, tensor in weights.items()}
    save_file(held, tmp_path / "file", metadata)
    assert {p.dtype for p in build.load_dit(tmp_path / "file")[0].parameters()} == {torch.bfloat16}
    assert torch.equal(predicted(loaded(tmp_path / "file")), expected)


# T5


@pytest.fixture(scope="module")
def t5():
    return build.load_t5(build.TINY_T5, dtype=torch.float32)


def features(t5):
    ids = torch.tensor([[5, 9, 30, 2, 1, 0, 0]])
    return t5(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state


@pytest.mark.parametrize("shard_size", ("1GB", "200KB"))
def test_a_hugging_face_folder(shard_size, t5, tmp_path):
    t5.save_pretrained(tmp_path / "t5", max_shard_size=shard_size)
    assert torch.equal(features(build.load_t5(tmp_path / "t5")), features(t5))


def test_a_whole_t5_with_its_decoder(t5, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    whole = T5ForConditionalGeneration(T5Config(**{**t5.config.to_dict(), "num_decoder_layers": 1}))
    whole.encoder.load_state_dict(t5.encoder.state_dict())
    whole.save_pretrained(tmp_path / "t5")
    assert torch.equal(features(build.load_t5(tmp_path / "t5")), features(t5))


LLAMA_T5 = {
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "encoder.block": "enc.blk",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}


@pytest.mark.parametrize("kind", ("Q8_0", "F16"))
def test_a_t5_gguf_in_the_names_of_llama_cpp(kind, t5, tmp_path):
    type_ = gguf.GGMLQuantizationType[kind]
    held = {}
    for name, tensor in load_file(build.TINY_T5).items():
        for ours, theirs in LLAMA_T5.items():
            name = name.replace(ours, theirs)
        held[name] = tensor
    assert gguf.MODEL_ARCH.T5ENCODER in gguf.MODEL_ARCH

    def packed(name, array):
        return (gguf.quants.quantize(array, type_), type_) if array.ndim == 2 and "rel_b" not in name else None

    made = build.load_t5(write_gguf(tmp_path / "file", held, packed), dtype=torch.float32)
    assert bool(quantized_layers(made)) == (kind == "Q8_0")
    assert relative_error(features(made), features(t5)) < (0.03 if kind == "Q8_0" else 2e-3)


@pytest.mark.parametrize("scaled", (False, True))
def test_a_t5_in_float8(scaled, t5, tmp_path):
    held = {}
    for name, tensor in load_file(build.TINY_T5).items():
        if (tensor.ndim == 2 and "SelfAttention" in name and "bias" not in name) or "Dense" in name:
            scale = tensor.float().abs().max() / 448 if scaled else torch.tensor(1.0)
            held[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            if scaled:
                held[name.replace(".weight", ".scale_weight")] = scale
        else:
            held[name] = tensor
    if scaled:
        held["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(held, tmp_path / "file")
    made = build.load_t5(tmp_path / "file", dtype=torch.float32)
    assert quantized_layers(made)
    assert relative_error(features(made), features(t5)) < 0.16
