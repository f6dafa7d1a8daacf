"""Whole trainings of the embedded model."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_core.errors import DatasetError, MochiError, TrainingError
from mochi_core.pipeline import MochiPipeline, TextToVideo
from mochi_core.sampling.schedule import linear_quadratic
from mochi_core.shapes import VideoSize
from mochi_core.training import trainer
from mochi_core.training.dataset import Dataset
from mochi_core.training.metrics import NAME, read_metrics
from mochi_core.training.prepare import PrepareModels, PrepareOptions, prepare
from mochi_core.training.settings import settings
from mochi_core.training.snapshot import newest, snapshots
from mochi_core.training.trainer import TrainingConfig, prepared, train
from mochi_core.video_file import write_mp4
from mochi_core.weights import build
from mochi_core.weights.lora import attached, branches
from mochi_core.weights.lora_file import read_lora

SIZE = VideoSize(64, 64, 13)
CAPTION = "a yellow circle growing on a white background"
TOY = Path(__file__).parent / "toy_training.py"


def config(prepared, output, **changed):
    values = {
        "dataset": str(prepared),
        "output": str(output),
        "steps": 4,
        "save_every": 2,
        "tensorboard": False,
        "model": {"dtype": "fp32"},
        "optimizer": {"rate": 1e-3, "warmup": 2},
    }
    return settings(TrainingConfig, values | changed)


def losses(folder):
    return [line["loss"] for line in read_metrics(Path(folder))]


def diamond():
    """Nothing that the model knows, nor anything of what the caption says: `T H W 3`."""
    video = torch.tensor([0.1, 0.1, 0.4]).expand(13, 64, 64, 3).clone()
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    for frame in range(13):
        inside = (columns - 20 - 2 * frame).abs() + (rows - 44 + 2 * frame).abs() < 14
        video[frame][inside] = torch.tensor([1.0, 0.8, 0.2])
    return video


def likeness(video, other):
    """PSNR, in dB."""
    return -10 * torch.log10((video - other).square().mean()).item()


def test_one_clip_is_learnt_by_heart(tmp_path):
    """The loss falls, and what the caption makes is the clip, as well as the VAE can show it."""
    (tmp_path / "clips").mkdir()
    write_mp4(tmp_path / "clips/a.mp4", [diamond()])
    (tmp_path / "clips/a.txt").write_text(CAPTION)
    prepare(tmp_path / "clips", tmp_path / "data", PrepareOptions((SIZE,)), PrepareModels.tiny())
    whole = {"rank": 16}
    own = config(
        tmp_path / "data",
        tmp_path / "out",
        steps=100,
        save_every=0,
        data={"batch_size": 4, "single_clip": True, "caption_dropout": 0, "noise_levels": {"stratified": True}},
        lora={"qkv": whole, "out": whole, "feed_forward": whole},
        optimizer={"rate": 1e-2, "warmup": 5},
    )
    path = train(own)
    curve = losses(own.output)
    assert sum(curve[-10:]) < 0.3 * sum(curve[:10])
    pipeline = MochiPipeline.tiny()
    request = TextToVideo(CAPTION, size=SIZE, schedule=linear_quadratic(16), cfg=1.0, seed=5)
    dataset = Dataset.open(tmp_path / "data")
    best = likeness(torch.cat(list(pipeline.decode(dataset.load(dataset.clips[0]).mean[None])), dim=1)[0], diamond())
    before = likeness(pipeline(request), diamond())
    with attached(pipeline.dit, branches([(read_lora(path, pipeline.dit), 1.0)])):
        after = likeness(pipeline(request), diamond())
    assert before < 10 and after > best - 3, (before, after, best)


def test_goes_on_where_it_stopped(prepared_clips, tmp_path):
    dropout = {"qkv": {"rank": 4, "dropout": 0.2}}
    whole = train(config(prepared_clips, tmp_path / "whole", lora=dropout, ema=0.5))

    def stop(done):
        if done.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(prepared_clips, tmp_path / "broken", lora=dropout, ema=0.5), stop)
    broken = train(config(prepared_clips, tmp_path / "broken", lora=dropout, ema=0.5))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert whole.read_bytes() == broken.read_bytes()


def test_a_folder_is_for_one_training_at_a_time(prepared_clips, tmp_path):
    own = config(prepared_clips, tmp_path, steps=2)

    def second(done):
        with pytest.raises(TrainingError, match=r"is being written to by another process.*choose another folder"):
            train(own)

    train(own, second)
    train(own)


def test_changed_settings_are_named(prepared_clips, tmp_path):
    train(config(prepared_clips, tmp_path, steps=1))
    with pytest.raises(TrainingError, match=r"task\.lora\.qkv\.rank was 16 and is 8"):
        train(config(prepared_clips, tmp_path, steps=1, lora={"qkv": {"rank": 8}}))
    with pytest.raises(TrainingError, match=r"loop\.steps was 1 and is 2"):
        train(config(prepared_clips, tmp_path, steps=2))


def test_changed_clips_are_named(prepared_clips, tmp_path):
    """A dataset that was prepared again with other captions is another one."""
    source = tmp_path / "clips"
    source.mkdir()
    write_mp4(source / "a.mp4", [diamond()])
    (source / "a.txt").write_text("a circle")
    prepare(source, tmp_path / "data", PrepareOptions((SIZE,)), PrepareModels.tiny())
    train(config(tmp_path / "data", tmp_path / "out", steps=1))
    (source / "a.txt").write_text("a box")
    prepare(source, tmp_path / "data", PrepareOptions((SIZE,)), PrepareModels.tiny())
    with pytest.raises(TrainingError, match=r"task\.dataset was"):
        train(config(tmp_path / "data", tmp_path / "out", steps=1))


def test_half_precision_base_and_float32_factors(prepared_clips, tmp_path):
    own = config(prepared_clips, tmp_path, model={"dtype": "bf16"})
    with prepared(own) as task:
        assert task.dtype == torch.bfloat16
        assert all(parameter.dtype == torch.float32 for parameter in task.trained.parameters())
        loss = task.loss(0)
        assert loss.value.dtype == torch.float32
        loss.value.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in task.trained.parameters())


@pytest.mark.parametrize("base, likeness", [("fp8_scaled", 0.98), ("q8_0", 0.99), ("q4_0", 0.8)])
def test_base_in_fewer_bits_learns_the_same_direction(base, likeness, prepared_clips, tmp_path):
    gradients = []
    for one in ("keep", base):
        with prepared(config(prepared_clips, tmp_path, model={"dtype": "fp32", "base": one})) as task:
            loss = task.loss(0)
            loss.value.backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in task.trained.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > likeness
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("memory", [{"qkv": 9, "feed_forward": 2}, {"post_attention": 1}, {"blocks": 4}])
def test_memory_settings_change_no_number(memory, prepared_clips, tmp_path):
    train(config(prepared_clips, tmp_path / "plain", steps=2))
    train(config(prepared_clips, tmp_path / "small", steps=2, memory=memory))
    torch.testing.assert_close(losses(tmp_path / "plain"), losses(tmp_path / "small"), rtol=1e-5, atol=0)


def test_under_inference_mode_as_comfyui_runs_nodes(prepared_clips, tmp_path):
    samples = {"every": 2, "prompts": [CAPTION], "width": 64, "height": 64, "frames": 7, "steps": 2}
    with torch.inference_mode():
        train(config(prepared_clips, tmp_path, steps=2, samples=samples))
    assert len(losses(tmp_path)) == 2


def test_samples_are_strips(prepared_clips, tmp_path):
    import av

    samples = {"every": 2, "prompts": [CAPTION, "a red box"], "width": 64, "height": 64, "frames": 7, "steps": 2}
    seen = []
    train(config(prepared_clips, tmp_path, samples=samples), seen.append)
    files = [done.sample for done in seen if done.sample]
    assert [file.name for file in files] == ["step_000002.mp4", "step_000004.mp4"]
    with av.open(str(files[0])) as video:
        frames = list(video.decode(video=0))
    assert len(frames) == 7 and (frames[0].width, frames[0].height) == (64 + 8 + 64, 64)


def test_whole_small_model(prepared_clips, tmp_path):
    """All weights learn, and the file is a model with the statistics of the first."""
    path = train(config(prepared_clips, tmp_path, kind="full", optimizer={"rate": 1e-3}))
    network, statistics = build.load_dit(path)
    before, known = build.load_dit(build.TINY_DIT, dtype=torch.float32)
    assert statistics == known
    same = [
        name for (name, a), (_, b) in zip(network.named_parameters(), before.named_parameters()) if torch.equal(a, b)
    ]
    assert same == []


def test_compiled_blocks(prepared_clips, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, real=torch.nn.Module.compile: real(self, backend="eager")
    )
    train(config(prepared_clips, tmp_path / "plain", steps=2))
    train(config(prepared_clips, tmp_path / "compiled", steps=2, model={"dtype": "fp32", "compile": True}))
    torch.testing.assert_close(losses(tmp_path / "plain"), losses(tmp_path / "compiled"), rtol=1e-5, atol=0)


def test_two_processes_learn_what_one_learns_from_both_batches(tmp_path):
    """As torchrun starts them (`accelerate launch` does it so on GPUs)."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, str(TOY), str(tmp_path / "two"), "6", "1"], check=True, timeout=120, capture_output=True)
    subprocess.run(
        [sys.executable, str(TOY), str(tmp_path / "one"), "6", "2"], check=True, timeout=60, capture_output=True
    )
    one, two = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=1e-7)


def test_two_processes_end_together(tmp_path):
    """SIGTERM, as schedulers send it: both end after the same step, which is saved, though none is due."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen([*launch, str(TOY), str(tmp_path), "4000", "1", "0"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / NAME).exists() or len((tmp_path / NAME).read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.wait(timeout=60)
    (last,) = snapshots(tmp_path)
    assert newest(tmp_path).step == read_metrics(tmp_path)[-1]["step"] >= 5, last
    assert (tmp_path / "final.safetensors").exists()


# What cannot be, said before anything is loaded


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network was loaded")

    for name in ("load_dit", "load_t5", "load_decoder", "load_vae"):
        monkeypatch.setattr(build, name, refuse)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    "changed, words",
    [
        ({"dataset": "nowhere"}, "nowhere.*prepare"),
        ({"model": {"dit": "nowhere.safetensors"}}, "nowhere.safetensors"),
        ({"device": "cuda:9"}, "device is 'cuda:9'"),
        (
            {"model": {"dit": str(build.TINY_DIT)}, "samples": {"every": 1, "prompts": ["a"]}},
            "without model.vae, model.t5, model.tokenizer",
        ),
    ],
)
def test_wrong_things_are_found_early(changed, words, prepared_clips, tmp_path):
    with pytest.raises(MochiError, match=words):
        train(config(prepared_clips, tmp_path, **changed))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_optimiser_that_is_not_installed_is_found_early(prepared_clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(TrainingError, match="needs the package bitsandbytes"):
        train(config(prepared_clips, tmp_path, optimizer={"name": "paged_adamw_8bit"}))


def test_memory_that_runs_out_has_a_remedy(prepared_clips, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr(trainer, "run", full)
    with pytest.raises(TrainingError, match=r"no more memory \(CUDA out of memory.*GiB\.\).*memory\.budget"):
        train(config(prepared_clips, tmp_path))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_dataset_of_another_vae_is_refused(prepared_clips, tmp_path):
    with safe_open(build.TINY_DIT, "pt") as file:
        metadata = file.metadata() | {"latents_mean": str([0.5] * 12)}
    save_file(load_file(build.TINY_DIT), tmp_path / "dit.safetensors", metadata)
    with pytest.raises(DatasetError, match="other latent statistics"):
        train(config(prepared_clips, tmp_path / "out", model={"dit": str(tmp_path / "dit.safetensors")}))


def test_clip_of_no_numbers_is_named_and_nothing_lost(prepared_clips, tmp_path):
    shutil.copytree(prepared_clips, tmp_path / "data")
    train_on = config(tmp_path / "data", tmp_path / "out", steps=9)

    def damage(done):
        if done.step == 3:
            clip = Dataset.open(tmp_path / "data").clips[1]
            tensors = load_file(clip.file)
            tensors["mean"][0, 0, 0, 0] = float("nan")
            save_file(tensors, clip.file)

    with pytest.raises(DatasetError, match=r"green\.mp4.*no finite numbers"):
        train(train_on, damage)
    assert len(losses(tmp_path / "out")) >= 3 and (tmp_path / "out/final.lora.safetensors").exists()
