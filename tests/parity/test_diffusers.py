"""Our networks against those of diffusers, with the same random weights.

diffusers has its own tensor names; the tables below say how ours turn into them.
"""

import pytest
import torch

from mochi_core.config import DiTConfig, StagesConfig, VAEConfig
from mochi_core.dit import AsymmDiT
from mochi_core.vae import Decoder, Encoder
from mochi_core.vae.encoder import fourier_features

pytestmark = pytest.mark.usefixtures("no_gradients")

# diffusers does not round the feed-forward width up to 256; at 192 and 96 the two rules agree.
DIT = DiTConfig(depth=3, heads=4, visual_dim=192, text_dim=96, text_feature_dim=64)
BLOCKS = (1, 1, 1, 1, 1)
VAE = VAEConfig(
    decoder=StagesConfig(32, (1, 2, 2, 2), BLOCKS, (False,) * 5),
    encoder=StagesConfig(32, (1, 2, 1, 2), BLOCKS, (False, True, True, True, True)),
)

DIT_NAMES = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "t5_y_embedder": "time_embed.pooler",
    "t5_yproj": "time_embed.caption_proj",
    "final_layer.mod": "norm_out.linear",
    "final_layer.linear": "proj_out",
    f"blocks.{DIT.depth - 1}.mod_y": f"transformer_blocks.{DIT.depth - 1}.norm1_context.linear_1",
    "blocks": "transformer_blocks",
    "mod_x": "norm1.linear",
    "mod_y": "norm1_context.linear",
    "attn": "attn1",
    "q_norm_x": "norm_q",
    "k_norm_x": "norm_k",
    "q_norm_y": "norm_added_q",
    "k_norm_y": "norm_added_k",
    "proj_x": "to_out.0",
    "proj_y": "to_add_out",
    "mlp_x.w1": "ff.net.0.proj",
    "mlp_x.w2": "ff.net.2",
    "mlp_y.w1": "ff_context.net.0.proj",
    "mlp_y.w2": "ff_context.net.2",
}
DIT_SPLITS = {"qkv_x": ("to_q", "to_k", "to_v"), "qkv_y": ("add_q_proj", "add_k_proj", "add_v_proj")}
SWAPPED_HALVES = ("ff.net.0.proj", "ff_context.net.0.proj", "norm_out.linear")

RES_BLOCK = {
    "stack.0": "resnets.0.norm1.norm_layer",
    "stack.2": "resnets.0.conv1.conv",
    "stack.3": "resnets.0.norm2.norm_layer",
    "stack.5": "resnets.0.conv2.conv",
    "attn_block.norm": "norms.0.norm_layer",
    "attn_block.attn.qkv": "attentions.0.qkv",
    "attn_block.attn.out": "attentions.0.to_out.0",
}
VAE_SPLITS = {"qkv": ("to_q", "to_k", "to_v")}


def res_block_names(ours, theirs):
    return {f"{ours}.{key}": f"{theirs}.{value}" for key, value in RES_BLOCK.items()}


ENCODER_NAMES = {
    "layers.0": "proj_in",
    **res_block_names("layers.1", "block_in"),
    **res_block_names("layers.5", "block_out"),
    "output_norm": "norm_out.norm_layer",
    "output_proj": "proj_out",
}
DECODER_NAMES = {
    "blocks.0.0": "conv_in",
    **res_block_names("blocks.0.1", "block_in"),
    **res_block_names("blocks.4.0", "block_out"),
    "output_proj": "proj_out",
}
for stage in range(3):
    ENCODER_NAMES[f"layers.{stage + 2}.layers.0"] = f"down_blocks.{stage}.conv_in.conv"
    ENCODER_NAMES |= res_block_names(f"layers.{stage + 2}.layers.1", f"down_blocks.{stage}")
    DECODER_NAMES |= res_block_names(f"blocks.{stage + 1}.blocks.0", f"up_blocks.{stage}")
    DECODER_NAMES[f"blocks.{stage + 1}.proj"] = f"up_blocks.{stage}.proj"


def in_diffusers_names(weights, names, splits):
    """`weights` under diffusers' names: the longest match first, joined projections split, some halves swapped."""
    renamed = {}
    for name, tensor in weights.items():
        for ours in sorted(names, key=len, reverse=True):
            name = f".{name}".replace(f".{ours}.", f".{names[ours]}.").removeprefix(".")
        if any(f"{layer}." in name for layer in SWAPPED_HALVES):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        joined = next((joined for joined in splits if f".{joined}." in name), None)
        parts = {joined: tensor} if joined is None else dict(zip(splits[joined], tensor.chunk(3)))
        renamed |= {name.replace(f".{joined}.", f".{part}."): some for part, some in parts.items()}
    return renamed


# How far diffusers' surplus frames reach: a residual block looks 4 frames back; those of the third stage are 7 frames
# of the video, and the fourth and fifth stage add 4 each.
FRAMES_REACHED = 15


def randomised(network, seed):
    """The network with weights of order one over the root of their fan-in, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1)
    return network.eval()


@pytest.fixture(scope="module")
def vaes(diffusers):
    """Our encoder and decoder, and diffusers' VAE with both their weights."""
    with torch.no_grad():
        encoder, decoder = randomised(Encoder(VAE), 1), randomised(Decoder(VAE), 2)
    theirs = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=VAE.encoder.channels,
        decoder_block_out_channels=VAE.decoder.channels,
        layers_per_block=BLOCKS,
    ).eval()
    theirs.encoder.load_state_dict(in_diffusers_names(encoder.state_dict(), ENCODER_NAMES, VAE_SPLITS))
    theirs.decoder.load_state_dict(in_diffusers_names(decoder.state_dict(), DECODER_NAMES, VAE_SPLITS))
    return encoder, decoder, theirs


def test_dit_agrees_for_two_prompts_of_different_length(diffusers):
    ours = randomised(AsymmDiT(DIT), 0)
    theirs = diffusers.MochiTransformer3DModel(
        num_attention_heads=DIT.heads,
        attention_head_dim=DIT.head_dim,
        num_layers=DIT.depth,
        pooled_projection_dim=DIT.text_dim,
        text_embed_dim=DIT.text_feature_dim,
    ).eval()
    theirs.load_state_dict(in_diffusers_names(ours.state_dict(), DIT_NAMES, DIT_SPLITS))

    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 12, 3, 8, 6, generator=generator)
    features = torch.randn(2, 256, DIT.text_feature_dim, generator=generator)
    sigma, mask = torch.tensor([0.7, 0.2]), torch.arange(256) < torch.tensor([[20], [6]])
    out = ours(latents, sigma, features, mask)
    their_out = theirs(latents, features, 1000 * (1 - sigma), mask, return_dict=False)[0]
    assert out.std() > 0.3
    torch.testing.assert_close(out, their_out, rtol=0, atol=2e-5)


@pytest.mark.parametrize("frames", (1, 13))
def test_encoder_agrees(vaes, frames):
    encoder, _, theirs = vaes
    video = torch.rand(1, 3, frames, 32, 24, generator=torch.Generator().manual_seed(4)) * 2 - 1
    posterior, their_posterior = encoder(video), theirs.encode(video).latent_dist
    assert posterior.mean.std() > 0.3
    # diffusers loses digits in the sines of large angles: ours takes whole turns off first.
    torch.testing.assert_close(posterior.mean, their_posterior.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.logvar, their_posterior.logvar, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", (1, 13))
def test_encoder_agrees_closely_from_the_same_fourier_features(vaes, monkeypatch, frames):
    encoder, _, theirs = vaes
    monkeypatch.setattr(theirs.encoder.fourier_features, "forward", fourier_features)
    video = torch.rand(1, 3, frames, 32, 24, generator=torch.Generator().manual_seed(4)) * 2 - 1
    torch.testing.assert_close(encoder(video).mean, theirs.encode(video).latent_dist.mean, rtol=0, atol=1e-5)


def test_decoder_agrees_only_far_from_the_start(vaes):
    """The first latent frame stands for one frame, so five of its six must go.

    The reference, and we, drop them where they arise, two and then one, so that later convolutions see the
    first frame repeated before it. diffusers drops all five at the end: its later convolutions see frames that
    never existed, and what they reach of the clip's beginning differs.
    """
    _, decoder, theirs = vaes
    latents = torch.randn(1, 12, 6, 4, 3, generator=torch.Generator().manual_seed(5))
    ours, other = decoder(latents), theirs.decode(latents).sample
    difference = (ours - other).abs().amax(dim=(0, 1, 3, 4))
    assert difference[:FRAMES_REACHED].min() > 1e-2
    assert difference[FRAMES_REACHED:].max() < 2e-5
