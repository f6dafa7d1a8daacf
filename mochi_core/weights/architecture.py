"""The architecture of a network from the shapes of its weights, for files that do not say it.

Names are ours (genmo's, and Hugging Face's for T5). What shapes cannot tell (the timestep scale, norm epsilons) is the
released model's.
"""

import math
from collections.abc import Iterable, Mapping

from ..config import MOCHI_1, DiTConfig, StagesConfig, TextConfig, VAEConfig, gated_mlp_dim
from ..errors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]


def depth_of(names: Iterable[str], stem: str) -> int:
    """How many numbered modules `names` has behind `stem`, counted to the highest number."""
    numbers = {name[len(stem) :].partition(".")[0] for name in names if name.startswith(stem)}
    return max((int(number) + 1 for number in numbers if number.isdecimal() and len(number) < 5), default=0)


def _shape(shapes: Shapes, name: str, axes: int, source: str) -> tuple[int, ...]:
    found = shapes.get(name)
    if found is None or len(found) != axes or 0 in found:
        raise WeightsError(
            f"{source} has {'no ' + name if found is None else f'{name} of shape {found}'}",
            "the architecture is read from it" + ("" if found is None else f": it must have {axes} axes"),
            "The file is incomplete or of another model: download it again",
        )
    return found


def dit_from(shapes: Shapes, source: str) -> DiTConfig:
    """Raises `WeightsError` when a shape that decides something is missing, or later blocks are."""
    released = MOCHI_1.dit
    depth = depth_of(shapes, "blocks.")
    visual, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4, source)
    text, features = _shape(shapes, "t5_yproj.weight", 2, source)
    heads = _shape(shapes, "pos_frequencies", 3, source)[1]
    config = DiTConfig(
        depth=depth,
        heads=heads,
        visual_dim=visual,
        text_dim=text,
        visual_mlp_ratio=_mlp_ratio(shapes, "mlp_x", visual, released.visual_mlp_ratio),
        text_mlp_ratio=_mlp_ratio(shapes, "mlp_y", text, released.text_mlp_ratio),
        patch_size=patch,
        latent_channels=channels,
        text_feature_dim=features,
    )
    if f"blocks.{depth - 1}.mlp_y.w1.weight" in shapes:
        expected = f"the released model has {released.depth}" if visual == released.visual_dim else "more must follow"
        raise WeightsError(
            f"{source} ends after block {depth - 1}, which still updates the text",
            f"the last block of a Mochi DiT does not: {expected}",
            "The file has only a part of the layers: download it again",
        )
    return config


def _mlp_ratio(shapes: Shapes, mlp: str, dim: int, usual: float) -> float:
    """The ratio that gives the width found; the usual one when there is no such layer or it fits."""
    inner = (0, *shapes.get(f"blocks.0.{mlp}.w2.weight", ()))[-1]
    if not inner or gated_mlp_dim(dim, usual) == inner:
        return usual
    return math.ceil(inner * 3 / 2) / dim


def vae_from(decoder: Shapes | None, encoder: Shapes | None, source: str) -> VAEConfig:
    """From either half or both; the half that is missing keeps the released numbers."""
    released = MOCHI_1.vae
    latent_channels, temporal, spatial = released.latent_channels, released.temporal_factors, released.spatial_factors
    halves = {"decoder": released.decoder, "encoder": released.encoder}
    if decoder is not None:
        latent_channels = _shape(decoder, "blocks.0.0.weight", 5, source)[1]
        temporal, spatial, halves["decoder"] = _decoder_stages(decoder, source)
    if encoder is not None:
        latent_channels = _shape(encoder, "output_proj.weight", 2, source)[0] // 2
        temporal, spatial, halves["encoder"] = _encoder_stages(encoder, source)
    return VAEConfig(latent_channels, temporal, spatial, halves["decoder"], halves["encoder"])


def _decoder_stages(shapes: Shapes, source: str) -> tuple[tuple[int, ...], tuple[int, ...], StagesConfig]:
    stages = sum(f"blocks.{stage}.proj.weight" in shapes for stage in range(depth_of(shapes, "blocks.")))
    projections = [_shape(shapes, f"blocks.{stage}.proj.weight", 2, source) for stage in range(1, stages + 1)]
    last = _shape(shapes, "output_proj.weight", 2, source)[1]
    widths = [inner for _, inner in projections] + [last]
    space = 2
    times = [outer // (width * space**2) for (outer, _), width in zip(projections, widths[1:])]
    counts = [depth_of(shapes, "blocks.0.") - 1]
    counts += [depth_of(shapes, f"blocks.{stage}.blocks.") for stage in range(1, stages + 1)]
    counts.append(depth_of(shapes, f"blocks.{stages + 1}."))
    attends = (False,) * (stages + 2)
    config = _stages(widths[::-1], counts[::-1], attends, StagesConfig.in_channels, source)
    return tuple(times[::-1]), (space,) * stages, config


def _encoder_stages(shapes: Shapes, source: str) -> tuple[tuple[int, ...], tuple[int, ...], StagesConfig]:
    layers = range(depth_of(shapes, "layers."))
    down = [layer for layer in layers if f"layers.{layer}.layers.0.weight" in shapes]
    if not down:
        raise WeightsError(f"{source} has an encoder without stages", "it must have some", "Download it again")
    strides = [_shape(shapes, f"layers.{layer}.layers.0.weight", 5, source) for layer in down]
    first, in_channels = _shape(shapes, "layers.0.weight", 2, source)
    counts = [down[0] - 1, *(depth_of(shapes, f"layers.{layer}.layers.") - 1 for layer in down)]
    counts.append(len(layers) - 1 - down[-1])
    stems = ["layers.1.", *(f"layers.{layer}.layers.1." for layer in down), f"layers.{down[-1] + 1}."]
    usual = MOCHI_1.vae.encoder.has_attention
    attends = tuple(
        f"{stem}attn_block.attn.qkv.weight" in shapes if count else usual[min(index, len(usual) - 1)]
        for index, (stem, count) in enumerate(zip(stems, counts))
    )
    config = _stages([first, *(shape[0] for shape in strides)], counts, attends, in_channels, source)
    return tuple(shape[2] for shape in strides), tuple(shape[3] for shape in strides), config


def _stages(
    widths: list[int], counts: list[int], attends: tuple[bool, ...], in_channels: int, source: str
) -> StagesConfig:
    base = widths[0]
    if any(width % base for width in widths):
        raise WeightsError(
            f"{source} has VAE stages of {widths} channels",
            f"each must be a multiple of the first, {base}",
            "The file is of another model: choose another one",
        )
    return StagesConfig(base, tuple(width // base for width in widths), tuple(counts), attends, in_channels)


def text_from(shapes: Shapes, source: str) -> TextConfig:
    """Of a T5 v1.1 encoder in Hugging Face's names."""
    vocabulary, width = _shape(shapes, "shared.weight", 2, source)
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = _shape(shapes, f"{attention}.relative_attention_bias.weight", 2, source)
    inner = _shape(shapes, f"{attention}.q.weight", 2, source)[0]
    feed_forward = _shape(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2, source)[0]
    return TextConfig(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=feed_forward,
        num_layers=depth_of(shapes, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
