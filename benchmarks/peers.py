"""The other implementations of the same networks, with our weights in them, called as they run best.

diffusers comes from the environment; ComfyUI's own networks ("native") from a checkout at `COMFYUI_PATH`, by default
`<repo>/.cache/comfyui/0.3.75`. Weights are given in genmo's names and shared where the layout allows, not copied.
A peer that is absent, or that cannot have this architecture, raises `PeerUnavailable`.

Both DiT peers are given the valid text tokens only: cropped, they compute what ours computes from the padded 256.
"""

import importlib.metadata
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import ROOT
from mochi_core.config import DiTConfig, VAEConfig

NAMES = ("diffusers", "native")
COMFYUI = Path(os.environ.get("COMFYUI_PATH", ROOT / ".cache" / "comfyui" / "0.3.75"))

State = Mapping[str, torch.Tensor]


class PeerUnavailable(Exception):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True)
class DiTInputs:
    """What one forward reads. `features`: `B L C`, `mask`: `B L`, its valid tokens first."""

    latents: torch.Tensor
    sigma: torch.Tensor
    features: torch.Tensor
    mask: torch.Tensor

    @property
    def cropped(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and mask without the slots that are padding in every prompt, but at least one slot."""
        longest = max(1, int(self.mask.sum(1).max()))
        return self.features[:, :longest].contiguous(), self.mask[:, :longest].contiguous()


def versions() -> dict[str, str | None]:
    """Which peers are here."""
    try:
        diffusers: str | None = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        diffusers = None
    version_file = COMFYUI / "comfyui_version.py"
    found = re.search(r'"(.+)"', version_file.read_text()) if version_file.is_file() else None
    return {"diffusers": diffusers, "comfyui": found[1] if found else None}


# ComfyUI's native networks


def import_comfy(device: str) -> None:
    """Makes `comfy` importable, with torch's attention (its fastest exact one on every device here)."""
    if not (COMFYUI / "comfy").is_dir():
        raise PeerUnavailable(f"no ComfyUI at {COMFYUI}; set COMFYUI_PATH")
    if str(COMFYUI) not in sys.path:
        sys.path.append(str(COMFYUI))  # last: its folders must not hide ours
    try:
        from comfy.cli_args import args
    except ImportError as error:
        raise PeerUnavailable(f"ComfyUI at {COMFYUI} cannot be imported: {error}") from error
    args.cpu = device == "cpu"
    args.use_pytorch_cross_attention = True


def native_dit(config: DiTConfig, state: State, device: str = "cpu") -> nn.Module:
    """ComfyUI's AsymmDiTJoint over these very tensors. Its `forward` returns the negated prediction."""
    import_comfy(device)
    import comfy.ops
    from comfy.ldm.genmo.joint_model import asymm_models_joint as native

    operations = comfy.ops.disable_weight_init
    # It insists on the released MLP width: build with that, then put the right layer in its place.
    released_mlp_ratio = 1536 * 8 / config.visual_dim
    with torch.device("meta"):
        model = native.AsymmDiTJoint(
            depth=config.depth,
            patch_size=config.patch_size,
            num_heads=config.heads,
            hidden_size_x=config.visual_dim,
            hidden_size_y=config.text_dim,
            mlp_ratio_x=released_mlp_ratio,
            mlp_ratio_y=config.text_mlp_ratio,
            in_channels=config.latent_channels,
            qk_norm=True,
            qkv_bias=False,
            out_bias=True,
            timestep_scale=config.timestep_scale,
            t5_feat_dim=config.text_feature_dim,
            use_t5=True,
            learn_sigma=False,
            operations=operations,
        )
        for block in model.blocks:
            block.mlp_x = native.FeedForward(
                in_features=config.visual_dim,
                hidden_size=int(config.visual_dim * config.visual_mlp_ratio),
                multiple_of=256,
                ffn_dim_multiplier=None,
                operations=operations,
            )
    return _filled(model, state, "ComfyUI's AsymmDiTJoint")


def run_native_dit(model: nn.Module, inputs: DiTInputs) -> torch.Tensor:
    """One forward; the result is the negated prediction."""
    features, mask = inputs.cropped
    return model(inputs.latents, inputs.sigma, features, mask.long(), num_tokens=features.shape[1])


def native_decoder(config: VAEConfig, state: State, device: str = "cpu") -> nn.Module:
    """ComfyUI's genmo VAE decoder over these very tensors."""
    import_comfy(device)
    from comfy.ldm.genmo.vae.model import Decoder

    half = config.decoder
    with torch.device("meta"):
        model = Decoder(
            out_channels=3,
            latent_dim=config.latent_channels,
            base_channels=half.base_channels,
            channel_multipliers=list(half.channel_multipliers),
            num_res_blocks=list(half.num_res_blocks),
            temporal_expansions=list(config.temporal_factors),
            spatial_expansions=list(config.spatial_factors),
            has_attention=list(half.has_attention),
            padding_mode="replicate",
            output_norm=False,
        )
    return _filled(model, state, "ComfyUI's decoder")


def run_native_decoder_tiled(model: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """One decode as the host's `VAE.decode_tiled_3d` does it, frames on the CPU.

    Tiles are half the picture each way and overlap by an eighth of a tile, like the node's 512 and 64 pixels; in time
    they have its own defaults, 64 frames that overlap by 8.
    """
    import comfy.utils

    tile = [max(1, length // 2) for length in latents.shape[3:]]
    overlap = [max(1, length // 8) if length > 1 else 0 for length in tile]
    return comfy.utils.tiled_scale_multidim(
        latents,
        lambda piece: model(piece).float(),
        tile=(64 // 6, *tile),
        overlap=(1, *overlap),
        upscale_amount=(lambda frames: max(0, frames * 6 - 5), 8, 8),
        out_channels=3,
        index_formulas=(6, 8, 8),
        output_device="cpu",
    )


# diffusers


def diffusers_dit(config: DiTConfig, state: State) -> nn.Module:
    """diffusers' MochiTransformer3DModel with these weights."""
    try:
        from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
    except ImportError as error:
        raise PeerUnavailable(f"diffusers cannot be imported: {error}") from error
    with torch.device("meta"):
        model = MochiTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            num_layers=config.depth,
            pooled_projection_dim=config.text_dim,
            in_channels=config.latent_channels,
            text_embed_dim=config.text_feature_dim,
        )
    return _filled(model, diffusers_dit_state(state), "diffusers' MochiTransformer3DModel")


def run_diffusers_dit(model: nn.Module, inputs: DiTInputs) -> torch.Tensor:
    """One forward."""
    features, mask = inputs.cropped
    timestep = 1000 * (1 - inputs.sigma)
    return model(inputs.latents, features, timestep, mask, return_dict=False)[0]


def diffusers_decoder(config: VAEConfig, state: State) -> nn.Module:
    """diffusers' MochiDecoder3D with these weights."""
    try:
        from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiDecoder3D
    except ImportError as error:
        raise PeerUnavailable(f"diffusers cannot be imported: {error}") from error
    half = config.decoder
    with torch.device("meta"):
        model = MochiDecoder3D(
            in_channels=config.latent_channels,
            out_channels=3,
            block_out_channels=half.channels,
            layers_per_block=half.num_res_blocks,
            temporal_expansions=config.temporal_factors,
            spatial_expansions=config.spatial_factors,
        )
    return _filled(model, diffusers_decoder_state(state), "diffusers' MochiDecoder3D")


def run_diffusers_decoder(model: nn.Module, config: VAEConfig, latents: torch.Tensor) -> torch.Tensor:
    """One decode, the superfluous first frames dropped as `AutoencoderKLMochi` drops them."""
    return model(latents)[0][:, :, math.prod(config.temporal_factors) - 1 :]


def diffusers_vae(config: VAEConfig, state: State) -> Any:
    """diffusers' AutoencoderKLMochi with these weights; its encoder has none."""
    decoder = diffusers_decoder(config, state)
    from diffusers.models.autoencoders.autoencoder_kl_mochi import AutoencoderKLMochi

    half = config.decoder
    with torch.device("meta"):
        vae = AutoencoderKLMochi(
            decoder_block_out_channels=half.channels,
            latent_channels=config.latent_channels,
            layers_per_block=half.num_res_blocks,
            temporal_expansions=config.temporal_factors,
            spatial_expansions=config.spatial_factors,
        )
    vae.decoder = decoder
    return vae.eval()


def diffusers_tiles(latents: torch.Tensor) -> dict[str, int]:
    """For `enable_tiling`: half the picture each way, and a stride of three quarters, like its own 256 and 192."""
    height, width = (max(1, length // 2) for length in latents.shape[3:])
    return {
        "tile_sample_min_height": 8 * height,
        "tile_sample_min_width": 8 * width,
        "tile_sample_stride_height": 8 * max(1, height * 3 // 4),
        "tile_sample_stride_width": 8 * max(1, width * 3 // 4),
    }


# Names: genmo's to diffusers'

_DIT_NAMES = (
    (r"x_embedder\.", "patch_embed."),
    (r"t_embedder\.mlp\.0\.", "time_embed.timestep_embedder.linear_1."),
    (r"t_embedder\.mlp\.2\.", "time_embed.timestep_embedder.linear_2."),
    (r"t5_y_embedder\.", "time_embed.pooler."),
    (r"t5_yproj\.", "time_embed.caption_proj."),
    (r"final_layer\.mod\.", "norm_out.linear."),
    (r"final_layer\.linear\.", "proj_out."),
    (r"blocks\.(\d+)\.mod_x\.", r"transformer_blocks.\1.norm1.linear."),
    (r"blocks\.(\d+)\.mod_y\.", r"transformer_blocks.\1.norm1_context.linear."),
    (r"blocks\.(\d+)\.mlp_x\.w1\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"blocks\.(\d+)\.mlp_x\.w2\.", r"transformer_blocks.\1.ff.net.2."),
    (r"blocks\.(\d+)\.mlp_y\.w1\.", r"transformer_blocks.\1.ff_context.net.0.proj."),
    (r"blocks\.(\d+)\.mlp_y\.w2\.", r"transformer_blocks.\1.ff_context.net.2."),
    (r"blocks\.(\d+)\.attn\.q_norm_x\.", r"transformer_blocks.\1.attn1.norm_q."),
    (r"blocks\.(\d+)\.attn\.k_norm_x\.", r"transformer_blocks.\1.attn1.norm_k."),
    (r"blocks\.(\d+)\.attn\.q_norm_y\.", r"transformer_blocks.\1.attn1.norm_added_q."),
    (r"blocks\.(\d+)\.attn\.k_norm_y\.", r"transformer_blocks.\1.attn1.norm_added_k."),
    (r"blocks\.(\d+)\.attn\.proj_x\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"blocks\.(\d+)\.attn\.proj_y\.", r"transformer_blocks.\1.attn1.to_add_out."),
)
_DIT_SPLIT = {"qkv_x": ("to_q", "to_k", "to_v"), "qkv_y": ("add_q_proj", "add_k_proj", "add_v_proj")}
_DIT_SWAPPED = re.compile(r"final_layer\.mod\.|blocks\.\d+\.mlp_[xy]\.w1\.")


def diffusers_dit_state(state: State) -> dict[str, torch.Tensor]:
    """Genmo's DiT tensors under diffusers' names: qkv split (views), two kinds of halves swapped (copies)."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        qkv = re.fullmatch(r"blocks\.(\d+)\.attn\.(qkv_[xy])\.weight", name)
        if qkv:
            for part, rows in zip(_DIT_SPLIT[qkv[2]], tensor.chunk(3), strict=True):
                converted[f"transformer_blocks.{qkv[1]}.attn1.{part}.weight"] = rows
            continue
        if _DIT_SWAPPED.match(name):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for pattern, replacement in _DIT_NAMES:
            name = re.sub(rf"^{pattern}", replacement, name)
        # The last block's text norm only scales, and has another class there.
        name = name.replace(f"s.{last}.norm1_context.linear.", f"s.{last}.norm1_context.linear_1.")
        converted[name] = tensor
    return converted


_RES_BLOCK = {0: "norm1.norm_layer", 2: "conv1.conv", 3: "norm2.norm_layer", 5: "conv2.conv"}


def diffusers_decoder_state(state: State) -> dict[str, torch.Tensor]:
    """Genmo's decoder tensors under diffusers' names."""
    last = 1 + max(int(name.split(".")[1]) for name in state if re.fullmatch(r"blocks\.\d+\.proj\.weight", name))

    def renamed(name: str) -> str:
        if name.startswith("output_proj."):
            return name.replace("output_proj.", "proj_out.")
        if name.startswith("blocks.0.0."):
            return name.replace("blocks.0.0.", "conv_in.")
        stage = int(name.split(".")[1])
        place = {0: "block_in", last: "block_out"}.get(stage, f"up_blocks.{stage - 1}")
        layer = re.fullmatch(r"blocks\.\d+\.(?:blocks\.)?(\d+)\.stack\.(\d)\.(\w+)", name)
        if layer is None:
            return re.sub(r"^blocks\.\d+", place, name)
        index = int(layer[1]) - (stage == 0)  # genmo's first stage counts its input convolution
        return f"{place}.resnets.{index}.{_RES_BLOCK[int(layer[2])]}.{layer[3]}"

    return {renamed(name): tensor for name, tensor in state.items()}


def _filled(model: nn.Module, state: State, what: str) -> nn.Module:
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise PeerUnavailable(f"{what} cannot have this architecture: {str(error)[:300]}") from error
    return model.requires_grad_(False).eval()
