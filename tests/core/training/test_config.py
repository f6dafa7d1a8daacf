"""Configurations: every key known, wrong ones named, the reference's understood."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from mochi_core.errors import MochiError, TrainingError
from mochi_core.sampling.schedule import linear_quadratic
from mochi_core.training.config import TrainingConfig, read_config
from mochi_core.training.lora import Rank

REFERENCE = Path(__file__).parent / "lora.yaml"
EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "lora.yaml"
LEAST = {"dataset": "clips", "output": "out"}


# Said once, of the first group of layers.
OF_EVERY_GROUP = {
    f"lora.{group}.{key}" for group in ("out", "feed_forward", "modulation") for key in ("alpha", "dropout")
}


def keys(values, name=""):
    """The keys of a configuration, with those of groups by dots."""
    if not isinstance(values, dict) or not values:
        return {name}
    return {key for one, inner in values.items() for key in keys(inner, f"{name}.{one}" if name else one)}


def written(folder, values):
    path = folder / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_least_that_will_do(tmp_path):
    config, notes = read_config(written(tmp_path, LEAST))
    assert config == TrainingConfig("clips", "out") and notes == ()
    assert config.model.dit == "tiny" and config.lora.qkv == Rank(16) and config.lora.feed_forward.rank == 0


def test_the_example_of_the_docs_has_the_defaults_it_speaks_of():
    config, notes = read_config(EXAMPLE)
    usual = TrainingConfig(config.dataset, config.output)
    differ = {name for name, value in asdict(usual).items() if asdict(config)[name] != value}
    assert differ == {"model", "memory", "samples"} and notes == ()
    assert config.samples.every and config.memory.budget == 24
    lacking = keys(asdict(usual)) - keys(yaml.safe_load(EXAMPLE.read_text())) - OF_EVERY_GROUP
    assert not lacking


def test_everything_is_read(tmp_path):
    config, _ = read_config(
        written(
            tmp_path,
            """
            dataset: clips
            output: out
            steps: 300
            grad_clip: 0.5
            model: {dit: dit.safetensors, vae: vae.safetensors, t5: t5, tokenizer: t5, base: q8_0, attention: sdpa}
            data: {batch_size: 2, noise_levels: {kind: logit_normal, mean: 0.5}}
            lora: {qkv: {rank: 8, alpha: 4, dropout: 0.1}, out: {rank: 0}, rslora: true}
            optimizer: {rate: 1e-4, betas: [0.9, 0.95], warmup: 10, slow: {bias: 0.5}}
            memory: {budget: 24, blocks: 48, resident_blocks: 20}
            samples:
              {every: 50, prompts: [a, b], width: 64, height: 64, frames: 19, steps: 30, cfg_schedule: "6*20, 4*10"}
            """,
        )
    )
    assert (
        config.optimizer.rate == 1e-4
        and config.optimizer.betas == (0.9, 0.95)
        and config.optimizer.slow == {"bias": 0.5}
    )
    assert config.lora.qkv == Rank(8, 4.0, 0.1) and config.lora.scale(config.lora.qkv) == pytest.approx(4 / 8**0.5)
    assert config.data.noise_levels.kind == "logit_normal" and config.memory.by_hand and config.memory.budget == 24
    assert config.samples.scales == (6.0,) * 20 + (4.0,) * 10 and config.samples.prompts == ("a", "b")
    assert config.loop.grad_clip == 0.5 and config.loop.sample_every == 50


@pytest.mark.parametrize(
    "values, words",
    [
        ({"stepss": 3}, "has stepss.*Did you mean steps"),
        ({"optimizer": {"lr": 1e-4}}, r"has optimizer\.lr.*optimizer knows name, rate"),
        ({"lora": {"qkv": {"rnak": 3}}}, r"has lora\.qkv\.rnak.*Did you mean rank"),
        ({"steps": "many"}, "steps is 'many'.*whole number"),
        ({"steps": 1.5}, "steps is 1.5.*whole number"),
        ({"steps": True}, "steps is True.*whole number"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"kind": "dora"}, "kind is 'dora'.*lora, full"),
        ({"kind": "full"}, "Set model.dtype to fp32"),
        ({"kind": "full", "model": {"dtype": "fp32"}, "memory": {"resident_blocks": 3}}, "not streamed. Remove it"),
        ({"model": {"base": "int4"}}, "model.base is 'int4'"),
        ({"model": {"attention": "sage"}}, "gradients"),
        ({"model": {"attention": "what"}}, "attention is 'what'"),
        ({"data": {"caption_dropout": 2}}, "data.caption_dropout is 2"),
        ({"data": {"noise_levels": {"kind": "u"}}}, "kind 'u'"),
        ({"optimizer": {"betas": [0.9]}}, "must have 2 items"),
        ({"optimizer": {"betas": 0.9}}, "must be a list"),
        ({"optimizer": []}, r"optimizer is \[\].*must have keys"),
        ({"memory": {"blocks": -1}}, "memory.blocks is -1"),
        ({"samples": {"every": 5}}, "Add a prompt"),
        ({"samples": {"every": 5, "prompts": ["a"], "frames": 20}}, "frames is 20.*6k"),
        ({"samples": {"every": 5, "prompts": ["a"], "cfg_schedule": "6*3"}}, "covers 3 steps"),
        ({"samples": {"every": 5, "prompts": "a"}}, "samples.prompts is 'a'.*list"),
        ({"lora": {"qkv": {"rank": 4, "dropout": 1}}}, "dropout 1"),
        ({"dataset": None}, "dataset is None"),
        ({"grad_clip": float("nan")}, "grad_clip is nan"),
    ],
)
def test_wrong_values_are_named(values, words, tmp_path):
    with pytest.raises(MochiError, match=words):
        read_config(written(tmp_path, LEAST | values))


@pytest.mark.parametrize("text, words", [("a: [", "cannot be read"), ("- a", "holds list"), ("", "holds NoneType")])
def test_files_that_are_none(text, words, tmp_path):
    with pytest.raises(TrainingError, match=words):
        read_config(written(tmp_path, text))
    with pytest.raises(TrainingError, match="cannot be read"):
        read_config(tmp_path / "missing.yaml")


def test_what_is_lacking_is_named(tmp_path):
    with pytest.raises(TrainingError, match="lacks output"):
        read_config(written(tmp_path, {"dataset": "a"}))


def test_code_in_yaml_is_not_run(tmp_path):
    with pytest.raises(TrainingError, match="cannot be read"):
        read_config(written(tmp_path, "dataset: !!python/object/apply:os.system ['touch /tmp/bad']"))


def test_reference_configuration():
    config, notes = read_config(REFERENCE)
    assert (config.dataset, config.output) == ("videos_prepared", "finetunes/my_mochi_lora")
    assert config.model.dit == "weights/dit.safetensors" and config.model.vae == "videos_prepared/decoder.safetensors"
    assert config.model.dtype == "bf16" and config.model.attention == "sdpa" and config.kind == "lora"
    assert config.lora.qkv == Rank(16, 32.0, 0.0) and config.lora.out == Rank(8, 8.0, 0.1)
    assert config.lora.feed_forward.rank == 0 and not config.lora.rslora
    assert (config.optimizer.rate, config.optimizer.weight_decay, config.optimizer.warmup) == (2e-4, 0.01, 200)
    assert (config.steps, config.save_every, config.grad_clip) == (2000, 150, 0.0)
    assert config.data.caption_dropout == 0.2 and not config.data.single_clip
    memory = config.memory
    assert (memory.qkv, memory.feed_forward, memory.post_attention, memory.blocks) == (48, 47, 46, None)
    samples = config.samples
    assert (samples.every, samples.seed, samples.size.frames, samples.steps) == (250, 12345, 37, 64)
    assert samples.schedule == linear_quadratic(64, threshold=0.025) and samples.scales == (6.0,) * 64
    assert samples.prompts == ("A snow globe that shatters.", "A cello: it falls apart.")
    assert any("output_dir" in note for note in notes)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("num_steps:", "num_stepss:", "training.num_stepss"),
        ('"[6.0] * 64"', "\"__import__('os').system('touch /tmp/bad')\"", "code is not run"),
        ('"linear_quadratic_schedule(64, 0.025)"', '"linear_schedule(64)"', "code is not run"),
        ("train_data_dir: videos_prepared", "", "train_data_dir = None"),
        ("lr: 2e-4", "lr: fast", "optimizer.rate is 'fast'"),
    ],
)
def test_reference_configuration_that_is_wrong(old, new, words, tmp_path):
    text = REFERENCE.read_text()
    assert old in text
    with pytest.raises(TrainingError, match=words):
        read_config(written(tmp_path, text.replace(old, new)))


@pytest.mark.parametrize(
    "code, scales",
    [
        ("[6.0] * 32 + [4.5] * 32", (6.0,) * 32 + (4.5,) * 32),
        ("[6.0, 5.0] * 2 + [1.0] * 60", (6.0, 5.0) * 2 + (1.0,) * 60),
    ],
)
def test_reference_guidance_schedules(code, scales, tmp_path):
    text = REFERENCE.read_text().replace("[6.0] * 64", code)
    assert read_config(written(tmp_path, text))[0].samples.scales == scales


def test_overrides_count(tmp_path):
    config, _ = read_config(written(tmp_path, LEAST), output="elsewhere", steps=7)
    assert (config.output, config.steps) == ("elsewhere", 7)
