import errno
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from einops import rearrange

from mochi_core.errors import DatasetError, LatentsError, MemoryBudgetError, WeightsError
from mochi_core.memory.plan import MemoryPolicy
from mochi_core.shapes import VideoSize
from mochi_core.text.conditioning import TextEncoder
from mochi_core.text.tokenizer import read_tokenizer
from mochi_core.training import prepare as module
from mochi_core.training import sources
from mochi_core.training.clips import read_pixels
from mochi_core.training.dataset import CLIPS, MANIFEST, Dataset, Manifest
from mochi_core.training.prepare import PrepareModels, PrepareOptions, prepare
from mochi_core.vae import Encoder
from mochi_core.weights import build

SIZE = VideoSize(32, 32, 7)
OPTIONS = PrepareOptions((SIZE,))
MODELS = PrepareModels.tiny()


def video(path, frames=8, shape=(32, 32), seed=0, trc=None, options=None):
    random = np.random.default_rng(seed)
    with av.open(str(path), "w", options=options or {}) as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width = shape
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "ultrafast"}
        stream.codec_context.time_base = Fraction(1, 15360)
        if trc:
            stream.codec_context.color_trc = trc
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 255, (*shape, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = n * 512, Fraction(1, 15360)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def clip(folder, name, caption="a red circle", **values):
    values.setdefault("seed", sum(name.encode()))
    video(folder / f"{name}.mp4", **values)
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def source(tmp_path):
    """Two clips with captions."""
    folder = tmp_path / "source"
    folder.mkdir()
    clip(folder, "a")
    clip(folder, "b", "a blue square")
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.fixture
def runs(monkeypatch):
    """How often the networks were loaded and ran."""
    count = Counter()

    def counted(owner, name, what):
        function = getattr(owner, name)

        def call(*arguments, **named):
            count[what] += 1
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    counted(build, "load_vae", "vae loaded")
    counted(build, "load_t5", "t5 loaded")
    counted(Encoder, "stagewise", "encoded")
    counted(TextEncoder, "__call__", "read")
    return count


def files(target):
    return sorted(path.name for path in (target / CLIPS).iterdir())


def reasons(report):
    return dict(report.skipped)


# What is made


def test_latents_and_features_are_those_of_the_networks(source, target):
    report = prepare(source, target, OPTIONS, MODELS)
    assert (report.prepared, report.unchanged, report.skipped, report.warnings) == (("a.mp4", "b.mp4"), (), (), ())
    dataset = Dataset.open(target)
    vae = build.load_vae(build.TINY_VAE, dtype=torch.float32)
    text_encoder = TextEncoder(build.load_t5(build.TINY_T5, dtype=torch.float32), read_tokenizer(build.TINY_TOKENIZER))
    for clip, caption in zip(dataset.clips, ("a red circle", "a blue square")):
        pixels = read_pixels(source / clip.name, SIZE).frames
        with torch.inference_mode():
            posterior = vae.encoder(rearrange(pixels, "T H W C -> 1 C T H W").float() / 127.5 - 1)
        text = text_encoder([caption])
        sample = dataset.load(clip)
        torch.testing.assert_close(sample.mean, posterior.mean[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample.logvar, posterior.logvar[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(sample.features, text.features[0][text.mask[0]])
        assert clip.caption == caption and clip.size == SIZE
    assert dataset.statistics == vae.statistics
    dataset.check(vae.encoder.config.latent_channels, text_encoder.width, vae.statistics)


def test_an_empty_caption_is_the_null_prompt(source, target):
    (source / "b.txt").write_text(" \n")
    prepare(source, target, OPTIONS, MODELS)
    dataset = Dataset.open(target)
    assert dataset.clips[1].caption == ""
    assert dataset.load(dataset.clips[1]).features.shape == (0, dataset.text_width)


def test_a_long_caption_is_cut_and_named(source, target):
    (source / "b.txt").write_text("circle " * 300 + "unseen")
    report = prepare(source, target, OPTIONS, MODELS)
    ((name, warning),) = report.warnings
    assert name == "b.mp4" and "longer than 256 tokens" in warning and "unseen" in warning
    dataset = Dataset.open(target)
    assert len(dataset.load(dataset.clips[1]).features) == 256
    assert prepare(source, target, OPTIONS, MODELS).warnings == report.warnings, "said again when nothing is done"


def test_windows_of_a_video(source, target):
    clip(source, "long", frames=20)
    report = prepare(source, target, PrepareOptions((SIZE,), clips_per_video=3), MODELS)
    assert report.prepared == ("a.mp4", "b.mp4", "long.mp4", "long.mp4 from frame 7")
    dataset = Dataset.open(target)
    first, second = (dataset.load(clip).mean for clip in dataset.clips[2:])
    assert not torch.allclose(first, second)


def test_sizes_by_aspect(source, target):
    clip(source, "wide", shape=(32, 64))
    report = prepare(source, target, PrepareOptions((SIZE, VideoSize(64, 32, 7))), MODELS)
    assert [(c.size.width, c.size.height) for c in Dataset.open(target).clips] == [(32, 32), (32, 32), (64, 32)]
    assert len(report.prepared) == 3


def test_names_that_are_no_file_names(source, target):
    name = "ü 影像; rm -rf .. 'x'" + "y" * 60
    clip(source, name)
    prepare(source, target, OPTIONS, MODELS)
    assert any(c.name == f"{name}.mp4" for c in Dataset.open(target).clips)
    assert all(file.isascii() and len(file) < 80 for file in files(target))


def test_what_is_enlarged_or_cropped_is_said(source, target):
    clip(source, "small", shape=(16, 16))
    clip(source, "wide", shape=(32, 96))
    warnings = dict(prepare(source, target, OPTIONS, MODELS).warnings)
    assert warnings["small.mp4"] == "16 x 16 is enlarged to 32 x 32"
    assert warnings["wide.mp4"] == "67% of the picture is cropped away"


def test_captions_of_no_video_are_said(source, target):
    (source / "c.txt").write_text("nothing")
    assert prepare(source, target, OPTIONS, MODELS).warnings == (("c.txt", "No video has this name"),)


def test_other_suffixes(source, target):
    (source / "a.mp4").rename(source / "a.MOV")
    (source / "a.txt").rename(source / "a.TXT")
    (source / "._b.mp4").write_bytes(b"what a Mac leaves")
    assert prepare(source, target, OPTIONS, MODELS).prepared == ("a.MOV", "b.mp4")


def test_the_files_own_dtype(source, target):
    prepare(source, target, OPTIONS, replace(MODELS, dtype=torch.float32))
    dataset = Dataset.open(target)
    exact = dataset.load(dataset.clips[0]).mean
    report = prepare(source, target, OPTIONS, replace(MODELS, dtype=None))
    rounded = dataset.load(Dataset.open(target).clips[0]).mean
    assert len(report.prepared) == 2 and rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.5


# What is skipped


def test_one_bad_clip_stops_no_other(source, target):
    (source / "empty.mp4").write_bytes(b"")
    clip(source, "short", frames=6)
    clip(source, "hdr", trc=16)
    clip(source, "mute", None)
    clip(source, "strange")
    (source / "strange.txt").write_bytes(b"\xff\xfe\xfa")
    (source / "empty.txt").write_text("")
    report = prepare(source, target, OPTIONS, MODELS)
    why = reasons(report)
    assert report.prepared == ("a.mp4", "b.mp4") and sorted(why) == [
        f"{name}.mp4" for name in ("empty", "hdr", "mute", "short", "strange")
    ]
    assert "empty.mp4 cannot be read" in why["empty.mp4"]
    assert "It has 6 frames at 30 fps: it needs 7 for 32 x 32. Give a shorter size" in why["short.mp4"]
    assert "HDR" in why["hdr.mp4"] and "tone mapping" in why["hdr.mp4"]
    assert "it must lie beside it as mute.txt" in why["mute.mp4"]
    assert "UTF-8" in why["strange.mp4"]
    assert "2 prepared, 0 unchanged, 5 skipped" in str(report) and "skipped  hdr.mp4: " in str(report)
    assert len(Dataset.open(target).clips) == 2


def test_a_truncated_video_is_used_as_far_as_it_goes(source, target):
    clip(source, "cut", frames=30, options={"movflags": "faststart"})
    content = (source / "cut.mp4").read_bytes()
    (source / "cut.mp4").write_bytes(content[: len(content) // 2])
    options = PrepareOptions((SIZE, VideoSize(32, 32, 1), VideoSize(32, 32, 25)))
    report = prepare(source, target, options, MODELS)
    assert "cut.mp4" in report.prepared and "7 frames of it are used" in dict(report.warnings)["cut.mp4"]


def test_a_video_that_decodes_shorter_than_it_says(source, target, monkeypatch):
    look = sources.look_at
    monkeypatch.setattr(sources, "look_at", lambda *a: replace(look(*a), frames=13))
    report = prepare(source, target, PrepareOptions((VideoSize(32, 32, 13), SIZE)), MODELS)
    assert len(report.prepared) == 2 and "it ends early" in dict(report.warnings)["a.mp4"]
    assert Dataset.open(target).clips[0].size == SIZE
    shutil.rmtree(target)
    with pytest.raises(DatasetError, match=r"None of the 2 videos .*It has 8 frames at 30 fps"):
        prepare(source, target, PrepareOptions((VideoSize(32, 32, 13),)), MODELS)


def test_nothing_to_prepare(source, target, runs, tmp_path):
    def refused(message, source=source, target=target, options=OPTIONS, models=MODELS, kind=DatasetError):
        with pytest.raises(kind, match=message):
            prepare(source, target, options, models)

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_bytes(b"")
    refused("empty has no video", source=tmp_path / "empty")
    refused("nowhere cannot be read", source=tmp_path / "nowhere")
    refused("source is the folder of the videos", target=source)
    refused("file is no folder of its own", target=tmp_path / "file")
    refused("full has files and is no dataset", target=tmp_path / "full")
    refused("nowhere.safetensors", models=replace(MODELS, vae=tmp_path / "nowhere.safetensors"), kind=WeightsError)
    refused("has no VAE encoder", models=replace(MODELS, vae=build.TINY_DIT))
    refused("tokenizer", models=replace(MODELS, tokenizer=tmp_path / "file"), kind=WeightsError)
    refused(r"None of the 2 videos .*a.mp4: It has 8 frames.*; b.mp4", options=PrepareOptions((VideoSize(32, 32, 13),)))
    assert not runs and not target.exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.doc"]


def test_what_are_no_options():
    with pytest.raises(DatasetError, match="No size"):
        PrepareOptions(())
    with pytest.raises(DatasetError, match="0 clips of each video"):
        PrepareOptions((SIZE,), 0)


def test_too_little_memory(source, target, runs):
    with pytest.raises(MemoryBudgetError, match="the encoder for 32 x 32 needs at least"):
        prepare(source, target, OPTIONS, replace(MODELS, memory=MemoryPolicy("cpu", 1e5)))
    assert not runs["encoded"]


@pytest.mark.parametrize("place", ["mean", "logvar", "features"])
def test_what_are_no_numbers_is_not_written(source, target, monkeypatch, place):
    def broken(function, change):
        return lambda *arguments, **named: change(function(*arguments, **named))

    nan = torch.tensor(float("nan"))
    if place == "features":
        change = lambda encoded: replace(encoded, features=encoded.features + nan)  # noqa: E731
        monkeypatch.setattr(TextEncoder, "__call__", broken(TextEncoder.__call__, change))
    else:
        change = lambda posterior: replace(posterior, **{place: getattr(posterior, place) + nan})  # noqa: E731
        monkeypatch.setattr(Encoder, "stagewise", broken(Encoder.stagewise, change))
    with pytest.raises(LatentsError, match=r"a\.mp4: .* NaN or infinite"):
        prepare(source, target, OPTIONS, MODELS)


# What is not made again


def test_nothing_is_made_twice(source, target, runs):
    prepare(source, target, OPTIONS, MODELS)
    assert runs == {"vae loaded": 1, "t5 loaded": 1, "encoded": 2, "read": 2}
    before, digest = files(target), Dataset.open(target).digest
    runs.clear()
    report = prepare(source, target, OPTIONS, MODELS)
    assert not runs and report.unchanged == ("a.mp4", "b.mp4") and not report.prepared
    assert files(target) == before and Dataset.open(target).digest == digest


def test_only_what_changed_is_made_again(source, target, runs):
    prepare(source, target, OPTIONS, MODELS)
    old = {entry.source: entry for entry in Manifest.read(target).clips}
    dataset = Dataset.open(target)
    mean, digest = dataset.load(dataset.clips[0]).mean, dataset.digest

    runs.clear()
    (source / "a.txt").write_text("something else")
    assert prepare(source, target, OPTIONS, MODELS).prepared == ("a.mp4",)
    assert runs == {"t5 loaded": 1, "read": 1}, "a caption costs no encoding"
    dataset = Dataset.open(target)
    assert torch.equal(dataset.load(dataset.clips[0]).mean, mean) and dataset.clips[0].caption == "something else"
    assert dataset.digest != digest

    runs.clear()
    clip(source, "b", "a blue square", seed=99)
    assert prepare(source, target, OPTIONS, MODELS).prepared == ("b.mp4",)
    assert runs == {"vae loaded": 1, "t5 loaded": 1, "encoded": 1, "read": 1}
    now = {entry.source: entry for entry in Manifest.read(target).clips}
    assert files(target) == sorted(entry.file for entry in now.values()), "stale files are gone"
    assert not {entry.file for entry in old.values()} & set(files(target))


def test_other_sizes_and_models(source, target, runs, tmp_path):
    prepare(source, target, OPTIONS, MODELS)
    runs.clear()
    wide = PrepareOptions((SIZE, VideoSize(64, 32, 7)))
    assert len(prepare(source, target, wide, MODELS).unchanged) == 2, "a size that no clip takes changes none"
    assert len(prepare(source, target, PrepareOptions((VideoSize(16, 16, 7),)), MODELS).prepared) == 2
    assert runs["encoded"] == 2
    prepare(source, target, OPTIONS, MODELS)
    runs.clear()
    moved = tmp_path / "vae.safetensors"
    shutil.copy(build.TINY_VAE, moved)
    assert len(prepare(source, target, OPTIONS, replace(MODELS, vae=moved)).unchanged) == 2, "the content counts"
    content = bytearray(moved.read_bytes())
    content[-3] ^= 1
    moved.write_bytes(content)
    assert len(prepare(source, target, OPTIONS, replace(MODELS, vae=moved)).prepared) == 2
    assert runs["encoded"] == 2


def test_a_damaged_file_is_made_again(source, target, runs):
    prepare(source, target, OPTIONS, MODELS)
    path = target / CLIPS / files(target)[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    runs.clear()
    assert prepare(source, target, OPTIONS, MODELS).prepared == ("a.mp4",)
    assert runs["encoded"] == 1


def test_what_is_gone_is_removed_and_nothing_else(source, target):
    prepare(source, target, OPTIONS, MODELS)
    (target / CLIPS / "mine.safetensors").write_bytes(b"")
    (target / CLIPS / f".{files(target)[0]}.x7.part").write_bytes(b"what a crash left")
    (source / "a.mp4").unlink()
    report = prepare(source, target, OPTIONS, MODELS)
    assert report.unchanged == ("b.mp4",) and report.warnings == (("a.txt", "No video has this name"),)
    (entry,) = Manifest.read(target).clips
    assert files(target) == sorted([entry.file, "mine.safetensors"])


# What is interrupted


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", range(1, 7))
def test_an_interrupted_run_is_taken_up(source, target, runs, after):
    """Two looks, two encodings, two captions: stopped after each of them."""

    def progress(step, total, preview=None):
        if step == after:
            raise Stop

    with pytest.raises(Stop):
        prepare(source, target, OPTIONS, MODELS, progress)
    encoded, read = max(0, min(2, after - 2)), max(0, after - 4)
    assert (runs["encoded"], runs["read"]) == (encoded, read)
    assert not encoded or len(files(target)) == encoded, "what has been replaced is gone"
    runs.clear()
    report = prepare(source, target, OPTIONS, MODELS)
    assert (runs["encoded"], runs["read"]) == (2 - encoded, 2 - read), "what was done is not done again"
    assert len(report.prepared) == 2 - read and len(report.unchanged) == read
    assert len(Dataset.open(target).clips) == 2 and len(files(target)) == 2


def test_an_encoding_can_be_cancelled_half_way(source, target, runs):
    calls = []

    def progress(step, total, preview=None):
        calls.append(step)
        if calls.count(3) == 3:  # once when the first was done, then in the second
            raise Stop

    with pytest.raises(Stop):
        prepare(source, target, OPTIONS, MODELS, progress)
    assert runs["encoded"] == 2 and len(files(target)) == 1
    assert [entry.source for entry in Manifest.read(target).clips] == ["a.mp4"]


def test_progress_ends_where_it_said(source, target):
    calls = []
    clip(source, "mute", None)
    prepare(source, target, OPTIONS, MODELS, lambda step, total, preview=None: calls.append((step, total)))
    assert calls[-1] == (7, 7) and [step for step, _ in calls] == sorted(step for step, _ in calls)
    calls.clear()
    prepare(source, target, OPTIONS, MODELS, lambda step, total, preview=None: calls.append((step, total)))
    assert len(calls) == 3


def test_progress_ends_where_it_said_without_a_clip_that_cannot_be_decoded(source, target, monkeypatch):
    calls, read = [], module.read_pixels

    def failing(path, *arguments):
        if path.name == "a.mp4":
            raise DatasetError("a.mp4", "is broken", "Mend it")
        return read(path, *arguments)

    monkeypatch.setattr(module, "read_pixels", failing)
    report = prepare(source, target, OPTIONS, MODELS, lambda step, total, preview=None: calls.append((step, total)))
    assert (
        calls[-1] == (5, 5)
        and report.prepared == ("b.mp4",)
        and reasons(report) == {"a.mp4": "a.mp4: is broken. Mend it."}
    )


def test_an_unfinished_dataset_says_so(source, target):
    def progress(step, total, preview=None):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, target, OPTIONS, MODELS, progress)
    with pytest.raises(DatasetError, match=r"2 of 2 clips .* lack features.*Run `prepare` again"):
        Dataset.open(target)


@pytest.mark.parametrize("full_at", ["a clip", "the manifest"])
def test_a_full_disk_costs_nothing_that_was_there(source, target, monkeypatch, runs, full_at):
    prepare(source, target, OPTIONS, MODELS)
    before, there = (target / MANIFEST).read_bytes(), Dataset.open(target)
    clip(source, "c")
    clip(source, "d")
    with monkeypatch.context() as context:
        count = []

        def full(*arguments, **named):
            count.append(1)
            if len(count) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*arguments, **named)

        if full_at == "a clip":
            write = module.write_safetensors
            context.setattr(module, "write_safetensors", full)
        else:
            write = Manifest.write
            context.setattr(Manifest, "write", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(source, target, OPTIONS, MODELS)
    assert {entry.source for entry in Manifest.read(target).clips} >= {"a.mp4", "b.mp4"}
    for old in there.clips:
        assert torch.isfinite(there.load(old).mean).all()
    if full_at == "the manifest":
        assert Dataset.open(target).digest == there.digest and (target / MANIFEST).read_bytes() == before
    runs.clear()
    report = prepare(source, target, OPTIONS, MODELS)
    assert report.unchanged[:2] == ("a.mp4", "b.mp4") and len(Dataset.open(target).clips) == 4
    assert runs["encoded"] == (1 if full_at == "a clip" else 2)


def test_a_folder_is_for_one_run_at_a_time(source, target):
    """The second one has looked at the clips by then, as the first one was still looking."""
    seen = []

    def progress(step, total, preview=None):
        if step == 3 and not seen:
            seen.append(step)
            with pytest.raises(DatasetError, match="is being written to by another process"):
                prepare(source, target, OPTIONS, MODELS)

    report = prepare(source, target, OPTIONS, MODELS, progress)
    assert seen and len(report.prepared) == 2 and len(prepare(source, target, OPTIONS, MODELS).unchanged) == 2


def test_the_networks_are_never_on_the_device_together(source, target, monkeypatch):
    there, seen = set(), []

    def watched(function, name):
        @contextmanager
        def during(*arguments, **named):
            there.add(name)
            seen.append(set(there))
            with function(*arguments, **named) as value:
                yield value
            there.discard(name)

        return during

    monkeypatch.setattr(module, "on_device", watched(module.on_device, "encoder"))
    monkeypatch.setattr(module, "reading", watched(module.reading, "t5"))
    prepare(source, target, OPTIONS, MODELS)
    assert seen == [{"encoder"}, {"t5"}]
