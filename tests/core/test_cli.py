"""The commands that make videos, or latents of them; those for weight files are in weights/test_convert.py."""

import os
import subprocess
import sys
import time

import av
import pytest
import torch
from typer.testing import CliRunner

from mochi_core import pipeline
from mochi_core.cli import app
from mochi_core.latents_file import write_latents
from mochi_core.training.config import read_config
from mochi_core.training.dataset import Dataset
from mochi_core.video_file import write_mp4
from mochi_core.weights.build import TINY_T5, TINY_TOKENIZER, TINY_VAE

SMALL = ["--width", "32", "--height", "32", "--frames", "7", "--steps", "2", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def frames_of(path):
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


def test_plan():
    result = run("plan", "--budget", 6, "--device", "cuda")
    assert result.exit_code == 0
    assert result.stdout.startswith("848 x 480, 163 frames, 6.0 GB on cuda\n")


def test_plan_in_too_little():
    result = run("plan", "--budget", 1, "--device", "cuda")
    assert result.exit_code == 1
    assert "needs at least" in result.stderr


def test_generate(tmp_path):
    result = run("generate", "a red circle", tmp_path / "red.mp4", *SMALL)
    assert result.exit_code == 0, result.output
    assert "red.mp4 (7 frames)" in result.stdout
    assert frames_of(tmp_path / "red.mp4") == 7
    assert [file.name for file in tmp_path.iterdir()] == ["red.mp4"]


def test_a_failed_decode_does_not_cost_the_sampling(tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(pipeline.MochiPipeline, "decode", lambda *_: iter([None]))
        failed = run("generate", "a red circle", tmp_path / "red.mp4", *SMALL)
    assert failed.exit_code == 1
    command = f"decode {tmp_path / 'red.latent'} {tmp_path / 'red.mp4'} --device cpu"
    assert f"The latents are kept: {command}\n" in failed.stderr
    again = run("generate", "a red circle", tmp_path / "red.mp4", *SMALL)
    assert again.exit_code == 1 and "red.latent exists: nothing is replaced unasked" in again.stderr
    result = run(*command.split())
    assert result.exit_code == 0, result.output
    assert frames_of(tmp_path / "red.mp4") == 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("red.mov", *SMALL), "OUT is red.mov: it must end in .mp4"),
        (("red.mp4", *SMALL, "--dit", "a", "--t5", "b"), "--vae, --tokenizer not given"),
        (("red.mp4", "--frames", "8"), "frames is 8"),
        (("red.mp4", *SMALL, "--budget", "0.0001"), "needs at least"),
        (("red.mp4", "--device", "tpu"), "--device is tpu"),
        (("red.mp4", *SMALL, "--budget", "nan"), "The budget is nan"),
    ],
)
def test_what_cannot_be_generated(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("generate", "a red circle", *arguments)
    assert result.exit_code == 1 and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "red.mp4").write_bytes(b"older")
    result = run("generate", "a red circle", tmp_path / "red.mp4", *SMALL)
    assert result.exit_code == 1 and "red.mp4 exists" in result.stderr
    assert run("generate", "a red circle", tmp_path / "red.mp4", *SMALL, "--overwrite").exit_code == 0
    assert frames_of(tmp_path / "red.mp4") == 7


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(pipeline.MochiPipeline, "sample", lambda *_: pytest.fail("sampled in vain"))
    result = run("generate", "a red circle", tmp_path / "file" / "red.mp4", *SMALL)
    assert result.exit_code == 1 and "file" in result.stderr


def test_a_batch_of_latents(tmp_path):
    write_latents(tmp_path / "two.latent", torch.zeros(2, 12, 1, 4, 4))
    result = run("decode", tmp_path / "two.latent", tmp_path / "two.mp4", "--device", "cpu")
    assert result.exit_code == 1 and "two.latent holds 2 videos: it must be one" in result.stderr


def test_a_device_that_nobody_has():
    result = run("plan", "--budget", 8, "--device", "foo")
    assert result.exit_code == 1 and "--device is foo: there are cuda, xpu, mps, cpu" in result.stderr


@pytest.fixture
def clips(tmp_path):
    """A folder with a clip that can be learnt from and one without a caption."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("red", "mute"):
        write_mp4(folder / f"{name}.mp4", [torch.rand(20, 64, 64, 3)], preset="ultrafast")
    (folder / "red.txt").write_text("a red circle")
    return folder


def test_prepare(clips, tmp_path):
    result = run("prepare", clips, tmp_path / "dataset", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "1 prepared, 0 unchanged, 1 skipped\n  skipped  mute.mp4: mute.mp4 has no caption: " in result.stdout
    (clip,) = Dataset.open(tmp_path / "dataset").clips
    assert (clip.size.width, clip.size.height, clip.size.frames) == (64, 64, 19)
    again = run("prepare", clips, tmp_path / "dataset", "--device", "cpu")
    assert again.exit_code == 0 and "0 prepared, 1 unchanged, 1 skipped" in again.stdout


def test_prepare_in_sizes_with_files(clips, tmp_path):
    files = ["--vae", TINY_VAE, "--t5", TINY_T5, "--tokenizer", TINY_TOKENIZER]
    sizes = ["--size", "32x32x7", "--size", "64x32x13", "--clips-per-video", 2]
    result = run("prepare", clips, tmp_path / "dataset", *files, *sizes, "--device", "cpu")
    assert result.exit_code == 0 and "2 prepared" in result.stdout, result.output
    first, second = Dataset.open(tmp_path / "dataset").clips
    assert first.size == second.size and (first.size.width, first.size.height, first.size.frames) == (32, 32, 7)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "64x64"], "The size is '64x64': it must be width x height x frames"),
        (["--size", "64x64x8"], "frames is 8"),
        (["--clips-per-video", "0"], "0 clips of each video"),
        (["--vae", "a", "--t5", "b"], "--tokenizer not given: all three files belong to a model"),
        (["--budget", "0.0001"], "needs at least"),
        (["--size", "64x64x25"], "None of the 2 videos"),
    ],
)
def test_what_cannot_be_prepared(clips, tmp_path, arguments, message):
    result = run("prepare", clips, tmp_path / "dataset", "--device", "cpu", *arguments)
    assert result.exit_code == 1 and message in result.stderr


CONFIG = """
steps: 3
save_every: 0
model: {dit: tiny, dtype: fp32}
lora: {qkv: {rank: 2}}
optimizer: {rate: 1e-3}
"""


@pytest.fixture
def training(clips, tmp_path):
    """The command that trains, without steps."""
    run("prepare", clips, tmp_path / "dataset", "--device", "cpu")
    (tmp_path / "lora.yaml").write_text(f"dataset: {tmp_path / 'dataset'}\noutput: {tmp_path / 'lora'}\n{CONFIG}")
    return "train", tmp_path / "lora.yaml"


def test_train(training, tmp_path):
    result = run(*training)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "lora" / "final.lora.safetensors")
    assert (tmp_path / "lora" / "final.lora.safetensors").stat().st_size > 0
    # More steps are another training, and it says so.
    more = run(*training, "--steps", 4)
    assert more.exit_code == 1 and "steps" in more.stderr
    elsewhere = run(*training, "--steps", 1, "--output", tmp_path / "other")
    assert elsewhere.exit_code == 0 and (tmp_path / "other" / "final.lora.safetensors").exists(), elsewhere.output


def test_a_wrong_key_of_a_training(training, tmp_path):
    with (tmp_path / "lora.yaml").open("a") as file:
        file.write("stepz: 4\n")
    result = run(*training)
    assert result.exit_code == 1 and "stepz" in result.stderr and "steps" in result.stderr


def test_files_for_samples_are_added_to_the_models(training, tmp_path):
    config, _ = read_config(tmp_path / "lora.yaml", model={"vae": "some.safetensors"})
    assert (config.model.vae, config.model.dtype) == ("some.safetensors", "fp32")


def test_sigterm_saves_what_was_learnt(training, tmp_path):
    command = [sys.executable, "-m", "mochi_core.cli", *map(str, training), "--steps", "100000"]
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "lora" / "metrics.jsonl"
    while stopped.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    stopped.terminate()
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and "the same command goes on from there" in said
    assert (tmp_path / "lora" / "final.lora.safetensors").exists() and list((tmp_path / "lora" / "snapshots").iterdir())
