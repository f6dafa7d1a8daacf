"""The tiny checkpoint's stages: each learns something in a few steps, and together they make a checkpoint."""

import json
from dataclasses import replace

import pytest
import torch

from mochi_core.config import DiTConfig, ModelConfig, StagesConfig, TextConfig, VAEConfig
from mochi_core.errors import TrainingError
from mochi_core.pipeline import MochiPipeline
from mochi_core.text.tokenizer import read_tokenizer
from mochi_core.training.loop import LoopOptions, run
from mochi_core.training.metrics import read_metrics
from mochi_core.training.optimizer import OptimizerOptions
from mochi_core.training.tiny import evaluate, scenes
from mochi_core.training.tiny.dit import DiTRecipe, DiTTask, new_dit
from mochi_core.training.tiny.files import ModelFiles
from mochi_core.training.tiny.latents import Cache, encoded
from mochi_core.training.tiny.make import Recipe, make, read_vae
from mochi_core.training.tiny.text import Reader, TextTask, encode, new_t5, reading_accuracy
from mochi_core.training.tiny.tokenizer import pieces, words, write_tokenizer
from mochi_core.training.tiny.vae import Crops, VAERecipe, VAETask, clips_for, new_vae

NO_ATTENTION = (False,) * 5
SMALL = ModelConfig(
    dit=DiTConfig(depth=1, heads=2, visual_dim=32, text_dim=16, text_feature_dim=16),
    vae=VAEConfig(
        decoder=StagesConfig(32, (1, 1, 1, 1), (0, 0, 0, 1, 0), NO_ATTENTION),
        encoder=StagesConfig(32, (1, 1, 1, 2), (0, 0, 0, 1, 0), (False, False, False, True, False)),
    ),
    text=TextConfig(vocab_size=200, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
)
CROPS = ((0.0, Crops(2, 7, 16)),)
MUON = OptimizerOptions("muon", 0.02, weight_decay=0.0, vector_rate=3e-3)


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    return read_tokenizer(tmp_path / "tokenizer.json")


def losses(task, folder, steps, optimizer=MUON):
    run(task, LoopOptions(steps, save_every=0, optimizer=optimizer, tensorboard=False), folder)
    return [line["loss"] for line in read_metrics(folder)]


def test_the_tokenizer_has_a_piece_for_every_word(tokenizer):
    assert len(pieces()) <= 200
    for word in words():
        assert len(tokenizer.all_ids(word)) == 2, word
    ids = tokenizer.all_ids("A RED circle, moving left!")
    assert ids[-1] == 1 and 2 not in ids
    assert tokenizer.text_of(ids) == "a red circle, moving left!"
    assert 2 not in tokenizer.all_ids("a zebra") and 2 in tokenizer.all_ids("\u732b")


def test_the_text_encoder_learns_to_read(tmp_path, tokenizer):
    reader = Reader(new_t5(SMALL.text, 0))
    task = TextTask(reader, tokenizer, 0, batch=64)
    told = losses(task, tmp_path / "text", 50, OptimizerOptions(rate=1e-2, weight_decay=0.0))
    assert told[-1] < 0.85 * told[0]
    assert set(reading_accuracy(reader, tokenizer, scenes.scenes(held_out=True)[:20], 0)) == {"mean", "tokens"}


def test_the_empty_caption_has_no_token(tokenizer):
    features, mask = encode(new_t5(SMALL.text, 0), tokenizer, ["", "a ball"])
    assert mask.tolist() == [[False] * 3, [True] * 3] and not features[0].any()


def test_the_vae_learns_and_then_its_decoder_alone(tmp_path):
    vae = new_vae(SMALL.vae, 0)
    recipe = VAERecipe(crops=CROPS)
    told = losses(VAETask(vae, recipe, 30, 0), tmp_path / "vae", 30)
    assert sum(told[-5:]) < 0.8 * sum(told[:5])
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    losses(VAETask(vae, recipe, 2, 1, decoder_alone=True), tmp_path / "decoder", 2)
    changed = {name.split(".")[0] for name, weight in vae.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"decoder"}


def test_the_crops_grow():
    recipe = VAERecipe()
    assert recipe.at(0, 100).size < recipe.at(60, 100).size < recipe.at(99, 100).size == scenes.SIZE
    assert clips_for(0, 3, Crops(2, 7, 16), 0.5).shape == (2, 3, 7, 16, 16)
    assert torch.equal(clips_for(0, 3, Crops(2, 7, 16), 0.5), clips_for(0, 3, Crops(2, 7, 16), 0.5))


def test_the_dit_learns_cached_latents(tmp_path, tokenizer):
    vae = new_vae(SMALL.vae, 0)
    cache = encoded(vae.encoder, 12, 7)
    cache.write(tmp_path / "cache.safetensors")
    again = Cache.read(tmp_path / "cache.safetensors")
    assert again.shown == cache.shown and torch.equal(again.mean, cache.mean)
    recipe = DiTRecipe(batch=16, lengths=((2, 0.7), (1, 0.3)))
    task = DiTTask(new_dit(SMALL.dit, 0), new_t5(SMALL.text, 0), tokenizer, {2: cache}, cache.statistics(), recipe, 0)
    told = losses(task, tmp_path / "dit", 60, replace(MUON, rate=0.05, vector_rate=1e-2))
    assert sum(told[-5:]) < 0.92 * sum(told[:5])
    clean, captions = task.batch(5)
    assert torch.equal(clean, task.batch(5)[0]) and captions == task.batch(5)[1]


def test_cached_latents_have_unit_variance_in_model_space():
    cache = encoded(new_vae(SMALL.vae, 0).encoder, 8, 7)
    drawn = cache.sample(torch.arange(8), 2, torch.Generator().manual_seed(0))
    assert cache.statistics().to_model_space(drawn).std() == pytest.approx(1, abs=0.1)


RECIPE = Recipe(
    config=SMALL,
    text_steps=2,
    vae_steps=2,
    decoder_steps=1,
    clips=4,
    dit_steps=2,
    text_batch=8,
    vae=VAERecipe(crops=CROPS),
    decoder=VAERecipe(kl=0.0, crops=CROPS),
    dit=DiTRecipe(batch=4),
    asked=2,
    evaluated=evaluate.Settings(7, 2),
)


def test_the_same_seed_makes_the_same_checkpoint(tmp_path):
    for name in ("one", "two"):
        make(tmp_path / name, RECIPE)
    one, two = ModelFiles(tmp_path / "one"), ModelFiles(tmp_path / "two")
    for part in ("dit", "vae", "t5", "tokenizer"):
        assert getattr(one, part).read_bytes() == getattr(two, part).read_bytes(), part


def test_make_writes_a_checkpoint_that_the_pipeline_runs(tmp_path):
    measured = make(tmp_path, RECIPE)
    assert measured is not None and 0 <= measured.generation["all"] <= 1
    files = ModelFiles(tmp_path)
    assert "Measured with the bfloat16 files (2 captions" in files.card.read_text()
    log = json.loads((tmp_path / "training.json").read_text())
    assert log["recipe"]["seed"] == 0 and log["measured"]["count"] == 2
    assert [line["step"] for line in log["stages"]["dit"]] == [1, 2] and "psnr" in log["stages"]["vae"][0]
    pipeline = MochiPipeline.from_files(dit=files.dit, vae=files.vae, t5=files.t5, tokenizer=files.tokenizer)
    assert next(pipeline.dit.parameters()).dtype == torch.bfloat16
    assert read_vae(files.vae).encoder.config == SMALL.vae

    # What is done is not done again, and another recipe is another checkpoint.
    written = files.dit.read_bytes()
    times = json.loads((tmp_path / "work" / "times.json").read_text())
    make(tmp_path, RECIPE)
    assert files.dit.read_bytes() == written
    again = json.loads((tmp_path / "work" / "times.json").read_text())
    assert again["vae"]["processor_minutes"] < 2 * times["vae"]["processor_minutes"] + 0.05
    with pytest.raises(TrainingError, match="other settings"):
        make(tmp_path, replace(RECIPE, dit_steps=3))
