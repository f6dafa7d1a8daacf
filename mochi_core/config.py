"""Architecture only: the numbers that fix every layer's shape.

A checkpoint may carry its own numbers in its metadata (`from_metadata`); a file without them is the released
model, `MOCHI_1`. `TINY` is the small checkpoint that ships in `assets/tiny`.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .errors import ConfigError

GROUP_NORM_GROUPS = 32
VAE_HEAD_DIM = 32
POOL_HEADS = 8
MLP_MULTIPLE = 256
# No number of an architecture comes near it.
LARGEST = 2**20


def _must_divide(value: int, divisor: int, what: str) -> None:
    if divisor < 1 or value < 1 or value % divisor:
        raise ConfigError(
            f"{what} is {value}", f"it must be a positive multiple of {divisor}", "Check the checkpoint's metadata"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# What a field of each type may hold, in words and as a test.
_RULES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: (
        f"a whole number above 0, at most {LARGEST}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 < v <= LARGEST,
    ),
    float: (f"a number above 0, at most {LARGEST}", lambda v: _is_number(v) and 0 < v <= LARGEST),
    str: ("text", lambda v: isinstance(v, str)),
    tuple[int, ...]: (
        f"a list of whole numbers, none negative or above {LARGEST}",
        lambda v: isinstance(v, tuple) and all(isinstance(n, int) and 0 <= n <= LARGEST for n in v),
    ),
    tuple[bool, ...]: (
        "a list of true and false",
        lambda v: isinstance(v, tuple) and all(isinstance(n, bool) for n in v),
    ),
}


def _from_metadata(cls: type, values: Any, names: Mapping[str, str] = {}) -> dict[str, Any]:
    """`values` with their names translated. Names that mean nothing here, or values that cannot be, are an error."""

    def refuse(what: str, rule: str) -> ConfigError:
        return ConfigError(f"The checkpoint's config {what}", rule, "Update this pack, or get the file again")

    if not isinstance(values, Mapping):
        raise refuse(f"is {values!r}", "it must be an object with named values")
    known = {one.name: one for one in fields(cls)}
    translated = {names.get(key, key): tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    unknown, missing = sorted(set(translated) - set(known)), []
    if unknown:
        raise refuse(f"has {', '.join(unknown)}", f"{cls.__name__} knows only {', '.join(known)}")
    for name, expected in known.items():
        if name not in translated:
            missing += [name] if expected.default is MISSING and expected.default_factory is MISSING else []
        elif expected.type in _RULES and not _RULES[expected.type][1](translated[name]):
            raise refuse(f"has {name} = {translated[name]!r}", f"it must be {_RULES[expected.type][0]}")
    if missing:
        raise refuse(f"lacks {', '.join(missing)}", f"{cls.__name__} needs each of them")
    return translated


@dataclass(frozen=True)
class DiTConfig:
    """The asymmetric diffusion transformer: a wide visual stream and a narrow text stream."""

    depth: int = 48
    heads: int = 24
    visual_dim: int = 3072
    text_dim: int = 1536
    visual_mlp_ratio: float = 4.0
    text_mlp_ratio: float = 4.0
    patch_size: int = 2
    latent_channels: int = 12
    text_feature_dim: int = 4096
    timestep_scale: float = 1000.0

    # The reference's names, as files carry them.
    METADATA_NAMES = {
        "num_heads": "heads",
        "hidden_size_x": "visual_dim",
        "hidden_size_y": "text_dim",
        "mlp_ratio_x": "visual_mlp_ratio",
        "mlp_ratio_y": "text_mlp_ratio",
        "in_channels": "latent_channels",
        "t5_feat_dim": "text_feature_dim",
    }

    def __post_init__(self) -> None:
        _must_divide(self.visual_dim, self.heads, "visual_dim")
        _must_divide(self.head_dim, 2, "the head width (visual_dim / heads)")
        _must_divide(self.text_feature_dim, POOL_HEADS, "text_feature_dim")
        _must_divide(self.depth, 1, "depth")

    @classmethod
    def from_metadata(cls, values: Mapping[str, Any]) -> "DiTConfig":
        """From the reference's names. Raises `ConfigError` on a name or number that cannot be."""
        return cls(**_from_metadata(cls, values, cls.METADATA_NAMES))

    @property
    def head_dim(self) -> int:
        return self.visual_dim // self.heads

    @property
    def visual_mlp_dim(self) -> int:
        return gated_mlp_dim(self.visual_dim, self.visual_mlp_ratio)

    @property
    def text_mlp_dim(self) -> int:
        return gated_mlp_dim(self.text_dim, self.text_mlp_ratio)


def gated_mlp_dim(dim: int, ratio: float) -> int:
    """Two thirds of `dim * ratio` (a gated MLP has three matrices instead of two), rounded up to 256."""
    inner = int(2 * int(dim * ratio) / 3)
    return -(-inner // MLP_MULTIPLE) * MLP_MULTIPLE


@dataclass(frozen=True)
class StagesConfig:
    """One half of the VAE; each tuple goes from the widest picture to the smallest.

    `num_res_blocks` and `has_attention` have two entries more than there are resamplings: the first and last
    stage keep their size.
    """

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: tuple[int, ...]
    has_attention: tuple[bool, ...]
    in_channels: int = 15

    def __post_init__(self) -> None:
        for count, what in ((self.num_res_blocks, "num_res_blocks"), (self.has_attention, "has_attention")):
            if len(count) != len(self.channel_multipliers) + 1:
                raise ConfigError(
                    f"{what} has {len(count)} entries",
                    f"{len(self.channel_multipliers)} channel multipliers need {len(self.channel_multipliers) + 1}",
                    "Check the checkpoint's metadata",
                )
        for channels in self.channels:
            _must_divide(channels, GROUP_NORM_GROUPS, "a VAE stage's channel count")

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)


_NO_ATTENTION = (False,) * 5


@dataclass(frozen=True)
class VAEConfig:
    """The causal video VAE: the decoder and, apart from it, a smaller encoder."""

    latent_channels: int = 12
    temporal_factors: tuple[int, ...] = (1, 2, 3)
    spatial_factors: tuple[int, ...] = (2, 2, 2)
    decoder: StagesConfig = field(
        default_factory=lambda: StagesConfig(128, (1, 2, 4, 6), (3, 3, 4, 6, 3), _NO_ATTENTION)
    )
    encoder: StagesConfig = field(
        default_factory=lambda: StagesConfig(64, (1, 2, 4, 6), (3, 3, 4, 6, 3), (False, True, True, True, True))
    )

    def __post_init__(self) -> None:
        resamplings = len(self.decoder.channel_multipliers) - 1
        for name in ("temporal_factors", "spatial_factors"):
            factors = getattr(self, name)
            if len(factors) != resamplings or min(factors, default=1) < 1:
                raise ConfigError(
                    f"{name} is {factors}",
                    f"there must be {resamplings}, each 1 or more",
                    "Check the checkpoint's metadata",
                )
        if len(self.encoder.channel_multipliers) != len(self.decoder.channel_multipliers):
            raise ConfigError(
                f"The encoder has {len(self.encoder.channel_multipliers)} channel multipliers",
                f"the decoder has {len(self.decoder.channel_multipliers)}, and both resample alike",
                "Check the checkpoint's metadata",
            )

    @classmethod
    def from_metadata(cls, values: Mapping[str, Any]) -> "VAEConfig":
        """From a checkpoint's metadata. Raises `ConfigError` on a name or number that cannot be."""
        translated = _from_metadata(cls, values)
        for half in ("decoder", "encoder"):
            if half in translated:
                translated[half] = StagesConfig(**_from_metadata(StagesConfig, translated[half]))
        return cls(**translated)


@dataclass(frozen=True)
class TextConfig:
    """The T5 v1.1 encoder, in the names Hugging Face gives its numbers. Its feed-forward layers are always gated."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        if self.feed_forward_proj != "gated-gelu":
            raise ConfigError(
                f"feed_forward_proj is {self.feed_forward_proj!r}", "it must be 'gated-gelu'", "Use a T5 v1.1 encoder"
            )

    @classmethod
    def from_metadata(cls, values: Mapping[str, Any]) -> "TextConfig":
        """From a checkpoint's metadata. Raises `ConfigError` on a name that cannot be."""
        return cls(**_from_metadata(cls, values))


@dataclass(frozen=True)
class ModelConfig:
    """The three networks of one model."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)


MOCHI_1 = ModelConfig()

TINY = ModelConfig(
    dit=DiTConfig(depth=4, heads=6, visual_dim=192, text_dim=96, text_feature_dim=64),
    vae=VAEConfig(
        decoder=StagesConfig(32, (1, 1, 2, 3), (0, 1, 1, 1, 1), _NO_ATTENTION),
        encoder=StagesConfig(32, (1, 2, 3, 4), (0, 0, 1, 0, 0), (False, True, True, True, True)),
    ),
    text=TextConfig(vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
)
