import pytest

from mochi_core.config import MOCHI_1, DiTConfig, StagesConfig, TextConfig, VAEConfig
from mochi_core.errors import ConfigError

STAGES = dict(
    base_channels=32, channel_multipliers=[1, 1, 1, 1], num_res_blocks=[0, 0, 0, 0, 0], has_attention=[False] * 5
)


def test_widths_of_the_released_model():
    dit = MOCHI_1.dit
    assert (dit.head_dim, dit.visual_mlp_dim, dit.text_mlp_dim) == (128, 8192, 4096)
    assert MOCHI_1.vae.decoder.channels == (128, 256, 512, 768)
    assert MOCHI_1.vae.encoder.channels == (64, 128, 256, 384)


@pytest.mark.parametrize("dim, inner", [(96, 256), (97, 512), (192, 512), (20, 256)])
def test_mlp_width_is_rounded_up_to_256(dim, inner):
    assert DiTConfig(visual_dim=dim * 2, heads=1, text_dim=dim).text_mlp_dim == inner


def test_metadata_in_the_names_of_the_reference(goldens):
    given = goldens.json("meta")["configs"]["dit"]
    names = ("depth", "num_heads", "hidden_size_x", "hidden_size_y", "mlp_ratio_x", "mlp_ratio_y", "t5_feat_dim")
    config = DiTConfig.from_metadata({name: given[name] for name in names})
    assert config == DiTConfig(depth=3, heads=4, visual_dim=96, text_dim=48, text_feature_dim=64)


@pytest.mark.parametrize(
    "numbers, message",
    [
        (dict(visual_dim=100, heads=3), "visual_dim is 100: it must be a positive multiple of 3"),
        (dict(visual_dim=9, heads=3), "the head width .* is 3: it must be a positive multiple of 2"),
        (dict(heads=0), "visual_dim is 3072: it must be a positive multiple of 0"),
        (dict(text_feature_dim=60), "text_feature_dim is 60: it must be a positive multiple of 8"),
        (dict(depth=0), "depth is 0: it must be a positive multiple of 1"),
        (dict(depth=-1), "depth is -1"),
    ],
)
def test_dit_numbers_that_do_not_divide(numbers, message):
    with pytest.raises(ConfigError, match=rf"{message}.*Check the checkpoint's metadata"):
        DiTConfig(**numbers)


@pytest.mark.parametrize("config", (DiTConfig, VAEConfig, TextConfig))
def test_unknown_names_are_listed(config):
    with pytest.raises(ConfigError, match=rf"config has flux, zebra: {config.__name__} knows only .*Update this pack"):
        config.from_metadata({"zebra": 1, "flux": 2})


def test_unknown_names_of_a_vae_half():
    with pytest.raises(ConfigError, match="config has zebra: StagesConfig knows only base_channels, "):
        VAEConfig.from_metadata({"decoder": STAGES | {"zebra": 1}})


def test_vae_from_metadata():
    config = VAEConfig.from_metadata({"latent_channels": 8, "decoder": STAGES})
    assert config.latent_channels == 8
    assert config.decoder == StagesConfig(32, (1, 1, 1, 1), (0,) * 5, (False,) * 5)
    assert config.encoder == MOCHI_1.vae.encoder


@pytest.mark.parametrize("name, value", (("num_res_blocks", 0), ("has_attention", False)))
def test_stages_of_unequal_length(name, value):
    with pytest.raises(ConfigError, match=rf"{name} has 1 entries: 4 channel multipliers need 5"):
        VAEConfig.from_metadata({"decoder": STAGES | {name: [value]}})


def test_vae_channels_must_fill_the_norm_groups():
    with pytest.raises(ConfigError, match="channel count is 48: it must be a positive multiple of 32"):
        VAEConfig.from_metadata({"decoder": STAGES | {"base_channels": 48}})


@pytest.mark.parametrize(
    "config, values",
    [
        (DiTConfig, []),
        (DiTConfig, "mochi"),
        (DiTConfig, {"depth": "4"}),
        (DiTConfig, {"depth": 4.0}),
        (DiTConfig, {"num_heads": None}),
        (DiTConfig, {"hidden_size_y": 0}),
        (DiTConfig, {"patch_size": 0}),
        (DiTConfig, {"in_channels": -12}),
        (DiTConfig, {"mlp_ratio_x": "wide"}),
        (VAEConfig, {"decoder": 5}),
        (VAEConfig, {"decoder": {"base_channels": 32}}),
        (VAEConfig, {"latent_channels": 0}),
        (VAEConfig, {"temporal_factors": [1, 2]}),
        (TextConfig, {"d_model": "wide"}),
        (DiTConfig, {"hidden_size_x": 2**30}),
        (DiTConfig, {"mlp_ratio_x": float("inf")}),
        (DiTConfig, {"mlp_ratio_y": float("nan")}),
        (VAEConfig, {"decoder": STAGES | {"num_res_blocks": [2**30] * 5}}),
        (VAEConfig, {"temporal_factors": [], "spatial_factors": []}),
        (TextConfig, {"feed_forward_proj": "relu"}),
        (TextConfig, {"feed_forward_proj": "gated-"}),
    ],
    ids=str,
)
def test_metadata_of_a_wrong_type_or_sign(config, values):
    with pytest.raises(ConfigError):
        config.from_metadata(values)


def test_a_vae_that_resamples_nowhere():
    half = {"base_channels": 32, "channel_multipliers": [1], "num_res_blocks": [1, 1], "has_attention": [False] * 2}
    config = VAEConfig.from_metadata({"temporal_factors": [], "spatial_factors": [], "decoder": half, "encoder": half})
    assert config.decoder.channels == (32,)
