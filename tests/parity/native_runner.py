"""Runs ComfyUI's own Mochi networks, in a process of its own: importing `comfy` reads `sys.argv` and picks a device.

    python native_runner.py COMFYUI_FOLDER INPUT.safetensors OUTPUT.safetensors

The input holds weights (`dit.weights.*`, `decoder.weights.*`, `encoder.weights.*`) and cases (`dit.case.NAME.*`,
`decoder.case.NAME`, `encoder.case.NAME`); the output holds what each case gives, under the same names.
"""

import sys

comfyui, source, target = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint  # noqa: E402
from comfy.ldm.genmo.vae.model import Decoder, Encoder  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

TENSORS = load_file(source)
HALF = dict(base_channels=32, num_res_blocks=[1] * 5, latent_dim=12, padding_mode="replicate")


def below(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in TENSORS.items() if name.startswith(prefix)}


def filled(network: torch.nn.Module, part: str) -> torch.nn.Module:
    network.load_state_dict(below(f"{part}.weights."))
    return network.eval().requires_grad_(False)


def dit() -> AsymmDiTJoint:
    # What comfy.model_detection sets for Mochi, but for the sizes.
    return AsymmDiTJoint(
        depth=3,
        num_heads=4,
        hidden_size_x=96,
        hidden_size_y=48,
        t5_feat_dim=64,
        in_channels=12,
        mlp_ratio_x=4.0,
        mlp_ratio_y=4.0,
        learn_sigma=False,
        qk_norm=True,
        qkv_bias=False,
        posenc_preserve_area=True,
        timestep_scale=1000.0,
        rope_theta=10000.0,
        use_t5=True,
        use_extended_posenc=False,
        attn_drop=0.0,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )


def run_dit(network: AsymmDiTJoint, case: dict[str, torch.Tensor]) -> torch.Tensor:
    # comfy.model_base.GenmoMochi counts the tokens like this.
    num_tokens = max(1, int(case["mask"].sum()))
    return network(case["latents"], case["sigma"], case["features"], case["mask"], num_tokens=num_tokens)


def decoder() -> Decoder:
    return Decoder(
        channel_multipliers=[1, 2, 2, 2],
        temporal_expansions=[1, 2, 3],
        spatial_expansions=[2, 2, 2],
        has_attention=[False] * 5,
        output_norm=False,
        **HALF,
    )


def encoder() -> Encoder:
    return Encoder(
        in_channels=15,
        channel_multipliers=[1, 2, 1, 2],
        temporal_reductions=[1, 2, 3],
        spatial_reductions=[2, 2, 2],
        prune_bottlenecks=[False] * 5,
        has_attentions=[False, True, True, True, True],
        input_is_conv_1x1=True,
        **HALF,
    )


def main() -> None:
    out = {}
    network = filled(dit(), "dit")
    for name in sorted({name.split(".")[0] for name in below("dit.case.")}):
        out[f"dit.case.{name}"] = run_dit(network, below(f"dit.case.{name}."))
    network = filled(decoder(), "decoder")
    for name, latents in below("decoder.case.").items():
        out[f"decoder.case.{name}"] = network(latents)
    network = filled(encoder(), "encoder")
    for name, video in below("encoder.case.").items():
        out[f"encoder.case.{name}"] = network(video).mean
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, target)


with torch.no_grad():
    main()
