"""LoRAs of every trainer, at the strength they were trained for, over every weight format."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mochi_core.dit import AsymmDiT
from mochi_core.errors import LoraError, WeightsError
from mochi_core.weights import build, layouts
from mochi_core.weights.blocks import BLOCK_FORMATS, quantize
from mochi_core.weights.checkpoint import fill
from mochi_core.weights.formats import Scaled, plain, quantized_float8
from mochi_core.weights.lora import attached, branches
from mochi_core.weights.lora_file import read_lora

pytestmark = pytest.mark.usefixtures("no_gradients")

NAMES = ("blocks.0.attn.qkv_x", "blocks.1.attn.qkv_y", "blocks.2.attn.proj_x", "blocks.1.mlp_x.w1", "blocks.0.mlp_y.w2")


@pytest.fixture
def genmo_file(goldens, tmp_path):
    path = tmp_path / "golden_lora.safetensors"
    path.write_bytes(goldens.file("lora.safetensors"))
    return path


def predicted(dit, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 12, 2, 8, 8, generator=generator).to(dtype)
    features = torch.randn(1, 20, dit.config.text_feature_dim, generator=generator)
    return dit(latents, torch.tensor([0.5]), features, torch.ones(1, 20))


def with_loras(dit, *loras):
    with attached(dit, branches(loras)):
        return predicted(dit)


@pytest.fixture(scope="module")
def tiny():
    return build.load_dit(build.TINY_DIT, dtype=torch.float32)[0]


@pytest.fixture
def changes(tiny):
    """Random `down` (4 rows) and `up` for some layers of the tiny DiT, by our names."""
    generator, shapes = torch.Generator().manual_seed(2), {n: tiny.get_submodule(n).weight.shape for n in NAMES}
    return {
        name: (torch.randn(4, i, generator=generator) * 0.1, torch.randn(o, 4, generator=generator) * 0.1)
        for name, (o, i) in shapes.items()
    }


def merged(tiny, changes, scale):
    """The tiny DiT with the changes added to its weights."""
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    for name, (down, up) in changes.items():
        state[f"{name}.weight"] += scale * (up @ down)
    dit = AsymmDiT(tiny.config, device="meta")
    dit.load_state_dict(state, assign=True)
    return predicted(dit)


@pytest.mark.parametrize("case", ("out_merged", "out_unmerged"))
def test_the_reference_s_adapter_at_its_alpha(case, dtype, golden_dit, goldens, genmo_file):
    cases, dit = goldens.tensors("dit_cases"), golden_dit(dtype)
    features, mask = goldens.text(cases, "in/b1/", dtype)
    lora = read_lora(genmo_file, dit)
    assert {change.scale for change in lora.layers.values()} == {2.0}  # alpha 8 over rank 4
    assert len(lora.layers) == 11 and not lora.unmatched
    with attached(dit, branches([(lora, 1.0)])):
        out = dit(cases["in/b1/x"].to(dtype), cases["in/b1/sigma"].to(dtype), features, mask)
    expected = goldens.tensors("lora_cases")[f"out_f64/b1/{case}"]
    assert (out.double() - expected).abs().max() < (1e-10 if dtype == torch.float64 else 5e-5)
    goldens.check(out, expected, f"lora/b1/{case}")


def test_genmo_s_torch_archive(genmo_file, golden_dit, tmp_path):
    kwargs = json.loads(json.dumps({"qkv_proj_lora_rank": 4, "qkv_proj_lora_alpha": 8, "out_proj_lora_alpha": 2}))
    torch.save({"state_dict": load_file(genmo_file), "kwargs": kwargs}, tmp_path / "lora.pt")
    dit = golden_dit(torch.float32)
    lora, reference = read_lora(tmp_path / "lora.pt", dit), read_lora(genmo_file, dit)
    for name, change in lora.layers.items():
        assert torch.equal(change.up, reference.layers[name].up)
        assert change.scale == (2.0 if "qkv" in name else 0.5)


def test_the_full_size_adapter_has_a_layer_for_each_of_its_tensors(goldens, tmp_path):
    shapes = goldens.json("manifests")["genmo_lora_rank16"]
    save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, tmp_path / "lora")
    lora = read_lora(tmp_path / "lora", AsymmDiT(device="meta"))
    assert not lora.unmatched and 2 * len(lora.layers) == len(shapes) == 382


# The same change as four trainers write it


def in_genmo(changes, path, alpha=None):
    """genmo names all q, k, v projections one rank and alpha, and all output projections another."""
    held = {}
    for name, (down, up) in changes.items():
        held |= {f"{name}.lora_A": down, f"{name}.lora_B": up}
    kwargs = {f"{kind}_proj_lora_{what}": v for kind in ("qkv", "out") for what, v in (("rank", 4), ("alpha", alpha))}
    save_file(held, path, {"kwargs": json.dumps(kwargs)} if alpha else None)
    return path


def in_kohya(changes, path, alpha=None):
    held = {}
    for name, (down, up) in changes.items():
        stem = "lora_unet_" + name.replace(".", "_")
        held |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        held |= {f"{stem}.alpha": torch.tensor(float(alpha))} if alpha else {}
    save_file(held, path)
    return path


def in_diffusers(changes, path, alpha=None, config=None):
    """diffusers' names: q, k and v apart, with `down` for each; the gated layer's halves swapped."""
    rules = {rule.ours: rule for rule in layouts.diffusers_dit(4)}
    held = {}
    for name, (down, up) in changes.items():
        pieces = up.chunk(len(rules[name].theirs))
        for theirs, piece in zip(rules[name].theirs, pieces):
            piece = torch.cat(piece.chunk(2)[::-1]) if rules[name].swap else piece
            held[f"transformer.{theirs}.lora_A.weight"] = down.clone()
            held[f"transformer.{theirs}.lora_B.weight"] = piece.clone()
    config = config or ({"transformer.r": 4, "transformer.lora_alpha": alpha} if alpha else None)
    save_file(held, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config)} if config else {"format": "pt"})
    return path


def in_peft(changes, path, alpha=None):
    """PEFT's folder: its config beside the weights, names as in the network it was trained on (ours)."""
    path.mkdir()
    held = {}
    for name, (down, up) in changes.items():
        held |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(held, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha or 4}))
    return path


WRITERS = (in_genmo, in_kohya, in_diffusers, in_peft)


@pytest.mark.parametrize("alpha", (None, 4, 8, 1))
@pytest.mark.parametrize("write", WRITERS)
def test_four_formats_give_the_same_output(write, alpha, tiny, changes, tmp_path):
    lora = read_lora(write(changes, tmp_path / "lora", alpha), tiny)
    assert not lora.unmatched and set(lora.layers) == set(changes)
    expected = merged(tiny, changes, (alpha or 4) / 4)
    assert (expected - predicted(tiny)).abs().max() > 0.02
    assert (with_loras(tiny, (lora, 1.0)) - expected).abs().max() < 1e-5


def test_what_diffusers_itself_saves(diffusers, tmp_path):
    """An adapter put on by PEFT and saved by diffusers' pipeline class, with patterns for rank and alpha."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    sizes = dict(num_attention_heads=6, attention_head_dim=32, num_layers=4, pooled_projection_dim=96)
    theirs = diffusers.MochiTransformer3DModel(**sizes, text_embed_dim=64).eval()
    theirs.save_pretrained(tmp_path / "base")
    targets = ["to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "ff.net.0.proj", "norm_out.linear"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    config.rank_pattern, config.alpha_pattern = {"to_k": 2}, {"to_k": 5, "transformer_blocks.1.attn1.to_v": 3}
    theirs.add_adapter(config)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs))
    diffusers.MochiPipeline.save_lora_weights(
        tmp_path, state, transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict()
    )
    ours, _ = build.load_dit(tmp_path / "base")
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors", ours)
    assert not lora.unmatched and len(lora.layers) == 4 * 4 + 2  # to_q is in the text pooling too
    latents, features = torch.randn(1, 12, 2, 8, 8), torch.randn(1, 256, 64)
    sigma, mask = torch.tensor([0.5]), torch.arange(256)[None] < 20
    expected = theirs(latents, features, 1000 * (1 - sigma), mask, return_dict=False)[0]
    with attached(ours, branches([(lora, 1.0)])):
        out = ours(latents, sigma, features, mask)
    assert (out - ours(latents, sigma, features, mask)).abs().max() > 0.05
    assert (out - expected).abs().max() < 5e-5


def test_rank_stabilised_scaling(tiny, changes, tmp_path):
    config = {"transformer.r": 4, "transformer.lora_alpha": 3, "transformer.use_rslora": True}
    lora = read_lora(in_diffusers(changes, tmp_path / "lora", config=config), tiny)
    assert (with_loras(tiny, (lora, 1.0)) - merged(tiny, changes, 3 / math.sqrt(4))).abs().max() < 1e-5


@pytest.mark.parametrize("write", (in_genmo, in_diffusers))
def test_only_some_of_q_k_v(write, tiny, changes, tmp_path):
    """A trainer may leave out some projections: the rest of our joined one stays as it is."""
    down, up = changes["blocks.0.attn.qkv_x"]
    up = torch.cat([up[:192], torch.zeros_like(up[192:])])
    some = {"blocks.0.attn.qkv_x": (down, up)}
    path = write(some, tmp_path / "lora")
    held = {name: t for name, t in load_file(path).items() if "to_k" not in name and "to_v" not in name}
    save_file(held, path)
    lora = read_lora(path, tiny)
    assert (with_loras(tiny, (lora, 1.0)) - merged(tiny, some, 1.0)).abs().max() < 1e-5


# Strengths and stacks


@pytest.mark.parametrize("strength", (1.0, 0.3, -0.7, 0.0))
def test_strengths(strength, tiny, changes, tmp_path):
    lora = read_lora(in_kohya(changes, tmp_path / "lora", alpha=8), tiny)
    out = with_loras(tiny, (lora, strength))
    assert (out - merged(tiny, changes, 2 * strength)).abs().max() < 1e-5
    if strength == 0:
        assert torch.equal(out, predicted(tiny))


def test_order_does_not_matter_and_what_is_removed_leaves_no_trace(tiny, changes, tmp_path):
    before = predicted(tiny)
    others = {name: (up_down[0].flip(1), up_down[1].flip(0)) for name, up_down in changes.items()}
    one = (read_lora(in_kohya(changes, tmp_path / "one"), tiny), 0.8)
    two = (read_lora(in_peft(others, tmp_path / "two"), tiny), -0.5)
    both = with_loras(tiny, one, two)
    assert (both - with_loras(tiny, two, one)).abs().max() < 1e-6
    summed = {
        name: (
            torch.cat([0.8 * changes[name][0], -0.5 * others[name][0]]),
            torch.cat([changes[name][1], others[name][1]], 1),
        )
        for name in changes
    }
    assert (both - merged(tiny, summed, 1.0)).abs().max() < 1e-5
    assert torch.equal(predicted(tiny), before)


def test_a_run_that_fails_leaves_no_trace_either(tiny, changes, tmp_path):
    before, lora = predicted(tiny), read_lora(in_kohya(changes, tmp_path / "one"), tiny)
    with pytest.raises(RuntimeError), attached(tiny, branches([(lora, 1.0)])):
        raise RuntimeError
    assert torch.equal(predicted(tiny), before)


# DoRA


@pytest.mark.parametrize("ending", ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"))
def test_dora_gives_rows_the_trained_lengths(ending, tiny, changes, tmp_path):
    name = "blocks.0.attn.qkv_x"
    down, up = changes[name]
    magnitude = torch.rand(len(up)) + 0.5
    held = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.{ending}": magnitude}
    if ending == "dora_scale":
        held[f"{name}.{ending}"] = magnitude[:, None].clone()
    save_file(held, tmp_path / "lora")
    lora = read_lora(tmp_path / "lora", tiny)
    weight = tiny.get_submodule(name).weight
    moved = weight + up @ down
    changed = moved * (magnitude / moved.norm(dim=1))[:, None]
    dit = AsymmDiT(tiny.config, device="meta")
    dit.load_state_dict({**tiny.state_dict(), f"{name}.weight": changed}, assign=True)
    assert (with_loras(tiny, (lora, 1.0)) - predicted(dit)).abs().max() < 1e-5
    dit.load_state_dict({**tiny.state_dict(), f"{name}.weight": weight + 0.25 * (changed - weight)}, assign=True)
    assert (with_loras(tiny, (lora, 0.25)) - predicted(dit)).abs().max() < 1e-5


def test_dora_by_peft(tmp_path):
    """PEFT's own layer, on one of ours."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    dit = build.load_dit(build.TINY_DIT, dtype=torch.float32)[0]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_x", "w1"], use_dora=True, init_lora_weights=False)
    theirs = get_peft_model(build.load_dit(build.TINY_DIT, dtype=torch.float32)[0], config)
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    theirs.save_pretrained(tmp_path / "adapter")
    assert any("magnitude" in name for name in get_peft_model_state_dict(theirs))
    lora = read_lora(tmp_path / "adapter", dit)
    assert len(lora.layers) == 4 + 4 + 3 and not lora.unmatched
    expected = predicted(theirs.base_model.model)
    assert (with_loras(dit, (lora, 1.0)) - expected).abs().max() < 2e-5


# Beside quantised weights

QUANTISERS = {
    "Q8_0": lambda weight: quantize(weight, BLOCK_FORMATS["Q8_0"]),
    "Q4_0": lambda weight: quantize(weight, BLOCK_FORMATS["Q4_0"]),
    "fp8": lambda weight: quantized_float8(weight, scaled=False),
    "fp8 scaled": lambda weight: quantized_float8(weight, scaled=True),
}


@pytest.mark.parametrize("kind", QUANTISERS)
def test_beside_quantised_weights_as_over_their_floats(kind, tiny, changes, tmp_path):
    weights = tiny.state_dict()
    matrices = [name for name, t in weights.items() if name.startswith("blocks.") and t.ndim == 2]
    quantised = weights | {name: QUANTISERS[kind](weights[name]) for name in matrices}
    dit, floats = AsymmDiT(tiny.config, device="meta"), AsymmDiT(tiny.config, device="meta")
    fill(dit, quantised, "here")
    fill(floats, {name: plain(weight, torch.float32) for name, weight in quantised.items()}, "here")
    assert isinstance(quantised[matrices[0]], Scaled) == (kind == "fp8 scaled")
    assert not isinstance(dit.blocks[0].attn.qkv_x, nn.Linear)
    lora = read_lora(in_kohya(changes, tmp_path / "lora", alpha=8), dit)
    out = with_loras(dit, (lora, 0.7))
    assert (out - merged(floats, changes, 1.4)).abs().max() < 1e-5
    assert torch.equal(predicted(dit), predicted(floats))


# What is wrong


def refused(path, dit, message, kind=LoraError):
    with pytest.raises(kind, match=message):
        read_lora(path, dit)


def test_a_lora_of_another_model(tiny, tmp_path):
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 8)}, tmp_path / "lora")
    refused(tmp_path / "lora", tiny, r"has no LoRA for this model: it holds 1 tensors \(lora_unet_double_.*Mochi 1\.$")


def test_a_checkpoint_is_no_lora(tiny):
    refused(build.TINY_DIT, tiny, "has no LoRA for this model")


def test_a_lora_for_another_size(tiny, genmo_file):
    message = (
        r"changes blocks.0.attn.\w+ by \d+ x \d+: this model's layer is \d+ x \d+\. Choose a LoRA that was trained"
    )
    refused(genmo_file, tiny, message)


def test_ranks_that_differ(tiny, changes, tmp_path):
    down, up = changes["blocks.0.attn.qkv_x"]
    held = {"blocks.0.attn.qkv_x.lora_A": down, "blocks.0.attn.qkv_x.lora_B": up[:, :3].contiguous()}
    save_file(held, tmp_path / "lora")
    refused(tmp_path / "lora", tiny, r"lora_A of shape \(4, 192\) and .*lora_B of shape \(576, 3\): .*of one rank")


def test_metadata_of_another_rank(tiny, changes, tmp_path):
    path = in_genmo({"blocks.0.attn.qkv_x": changes["blocks.0.attn.qkv_x"]}, tmp_path / "lora", alpha=8)
    save_file(load_file(path), path, {"kwargs": json.dumps({"qkv_proj_lora_rank": 16, "qkv_proj_lora_alpha": 16})})
    refused(path, tiny, "says qkv_proj_lora_rank = 16 and alpha = 16, but blocks.0.attn.qkv_x has rank 4")


@pytest.mark.parametrize("text", ("[]", "{", '"x"'))
def test_metadata_that_cannot_be_read(tiny, changes, tmp_path, text):
    path = in_genmo(changes, tmp_path / "lora")
    save_file(load_file(path), path, {"kwargs": text})
    refused(path, tiny, "has kwargs = .*must be a JSON object")


@pytest.mark.parametrize("alpha", ("9" * 400, "1e999", "NaN"))
def test_alphas_beyond_all_numbers(tiny, changes, tmp_path, alpha):
    path = in_genmo(changes, tmp_path / "lora")
    save_file(load_file(path), path, {"kwargs": f'{{"qkv_proj_lora_alpha": {alpha}}}'})
    refused(path, tiny, "(has|says) a scale of (inf|nan): .*must be")


@pytest.mark.parametrize("alpha", (torch.ones(0), torch.ones(2), torch.ones((), dtype=torch.complex64)))
def test_alphas_that_are_not_one_number(tiny, changes, tmp_path, alpha):
    path = in_kohya(changes, tmp_path / "lora")
    save_file(load_file(path) | {f"lora_unet_{NAMES[0].replace('.', '_')}.alpha": alpha}, path)
    refused(path, tiny, "(has|says) an alpha of shape .*must be")


@pytest.mark.parametrize("patterns", ("a", ["a"], 5, {".*" * 60 + "zz": 1}, {".+.+.+": 1}))
def test_alpha_patterns_that_are_none(tiny, changes, tmp_path, patterns):
    path = in_diffusers(changes, tmp_path / "lora", config={"transformer.alpha_pattern": patterns})
    refused(path, tiny, "says alpha_pattern (=|with) ")


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool, torch.complex64, torch.float8_e8m0fnu))
@pytest.mark.parametrize("ending", ("lora_A", "dora_scale"))
def test_changes_that_are_no_floats(tiny, changes, tmp_path, dtype, ending):
    path = in_genmo(changes, tmp_path / "lora")
    wrong = torch.ones(4, 192) if ending == "lora_A" else torch.ones(576)
    save_file(load_file(path) | {f"{NAMES[0]}.{ending}": wrong.to(dtype)}, path)
    refused(path, tiny, f"has {NAMES[0]}.{ending} .*floats")


def test_what_belongs_to_no_layer_is_listed(tiny, changes, tmp_path, caplog):
    path = in_kohya(changes, tmp_path / "lora")
    strangers = {"lora_te_encoder.lora_up.weight": torch.ones(1, 1), "blocks.0.attn.proj_x.lora_A": torch.ones(4, 192)}
    save_file(load_file(path) | strangers, path)
    lora = read_lora(path, tiny)
    assert lora.unmatched == ("blocks.0.attn.proj_x.lora_A", "lora_te_encoder.lora_up.weight")
    assert "2 tensors (lora_te_encoder.lora_up.weight" in caplog.text and "are not used" in caplog.text


def test_patterns_are_regular_expressions_as_peft_reads_them(tiny, changes, tmp_path):
    name = "blocks.0.attn.qkv_x"
    some = {name: changes[name]}

    def scale(config):
        path = tmp_path / "lora"
        shutil.rmtree(path, ignore_errors=True)
        in_peft(some, path)
        (path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8} | config))
        return read_lora(path, tiny).layers[name].scale

    assert scale({}) == 2
    assert scale({"alpha_pattern": {r"blocks\.\d+\.attn\.qkv_x": 16}}) == 4
    assert scale({"alpha_pattern": {r"^blocks.0.attn.qkv_x": 16}}) == 4
    assert scale({"alpha_pattern": {"qkv_x": 12, "attn.qkv_x": 16}}) == 3
    assert scale({"alpha_pattern": {"proj_x": 16}}) == 2
    assert scale({"r": 16, "rank_pattern": {"qkv_x": 4}}) == 2
    for wrong in ({"alpha_pattern": {"(a+)+$": 1}}, {"r": 16}, {"use_rslora": "false"}, {"lora_alpha": None}):
        with pytest.raises(LoraError, match="rank and alpha must be numbers that fit its tensors"):
            scale(wrong)


def test_settings_that_are_there_are_used_or_refused(tiny, changes, tmp_path):
    path = in_peft(changes, tmp_path / "lora")
    (path / "adapter_model.safetensors").rename(path / "renamed.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    layers = read_lora(path / "renamed.safetensors", tiny).layers
    assert {change.scale for change in layers.values()} == {2.0}  # PEFT's own default of alpha is 8
    (path / "adapter_config.json").write_text("[]")
    refused(path, tiny, "has adapter_config.json = .*must be a JSON object")
    both = {"transformer.lora_alpha": 8, "transformer.r": 4, "lora_alpha": 99, "unet.lora_alpha": 99}
    lora = read_lora(in_diffusers(changes, tmp_path / "both", config=both), tiny)
    assert {change.scale for change in lora.layers.values()} == {2.0}


def test_genmo_s_two_scales_and_a_layer_that_has_neither(tiny, changes, tmp_path):
    path = in_genmo(changes, tmp_path / "lora")
    kwargs = {"qkv_proj_lora_rank": 4, "qkv_proj_lora_alpha": 8, "out_proj_lora_rank": 4, "out_proj_lora_alpha": 4}
    save_file(load_file(path), path, {"kwargs": json.dumps(kwargs)})
    refused(path, tiny, r"two scales, \[1.0, 2.0\], and not which is that of blocks")


def test_values_that_are_not_finite(tiny, changes, tmp_path):
    down, up = changes["blocks.0.attn.qkv_x"]
    changes = {"blocks.0.attn.qkv_x": (down * float("nan"), up)}
    refused(in_kohya(changes, tmp_path / "lora"), tiny, "are not finite: a change must be numbers")


@pytest.mark.parametrize("name", ("lokr_w1", "hada_w1_a"))
def test_other_kinds_of_change_are_named(tiny, tmp_path, name):
    save_file({f"lora_unet_blocks_0_attn_qkv_x.{name}": torch.ones(4, 4)}, tmp_path / "lora")
    refused(tmp_path / "lora", tiny, "is a Lo(Kr|Ha): only LoRA and DoRA are read")


@pytest.mark.parametrize(
    "down, up",
    [
        ("lora_A.style.weight", "lora_B.style.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
def test_other_spellings(tiny, changes, tmp_path, down, up):
    held = {}
    for name, (low, high) in changes.items():
        held |= {f"{name}.{down}": low, f"{name}.{up}": high}
    save_file(held, tmp_path / "lora")
    assert set(read_lora(tmp_path / "lora", tiny).layers) == set(changes)


def test_merged_pieces_keep_the_dtype_of_the_file(tiny, changes, tmp_path):
    half = {name: (down.bfloat16(), up.bfloat16()) for name, (down, up) in changes.items()}
    lora = read_lora(in_diffusers(half, tmp_path / "lora", alpha=8), tiny)
    assert {(c.up.dtype, c.down.dtype, c.scale) for c in lora.layers.values()} == {
        (torch.bfloat16, torch.bfloat16, 2.0)
    }


def test_dora_of_a_row_of_zeros_is_finite(tiny, changes, tmp_path):
    name = "blocks.2.attn.proj_x"
    down, up = (x * 0 for x in changes[name])
    held = {f"{name}.lora_A": down, f"{name}.lora_B": up, f"{name}.dora_scale": torch.ones(len(up), 1)}
    save_file(held, tmp_path / "lora")
    state = {n: t.clone() for n, t in tiny.state_dict().items()}
    state[f"{name}.weight"][0] = 0
    dit = AsymmDiT(tiny.config, device="meta")
    dit.load_state_dict(state, assign=True)
    assert with_loras(dit, (read_lora(tmp_path / "lora", dit), 1.0)).isfinite().all()


def test_the_same_layer_twice(tiny, changes, tmp_path):
    path = in_kohya(changes, tmp_path / "lora")
    down, up = changes["blocks.0.attn.qkv_x"]
    again = {"blocks.0.attn.qkv_x.lora_A": down + 1, "blocks.0.attn.qkv_x.lora_B": up + 1}
    save_file(load_file(path) | again, path)
    refused(path, tiny, "holds both .*: a layer may be changed once")


def test_a_pickle_that_wants_to_run_code_does_not(tiny, tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("x",))

    torch.save({"state_dict": {"blocks.0.attn.qkv_x.lora_A": torch.ones(1)}, "kwargs": Evil()}, tmp_path / "lora.pt")
    refused(tmp_path / "lora.pt", tiny, "cannot be read without running code from it: .*safetensors", WeightsError)
    assert not marker.exists()
