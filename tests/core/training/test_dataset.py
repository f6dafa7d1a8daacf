import json

import pytest
import torch
from safetensors.torch import save_file

from mochi_core.errors import DatasetError
from mochi_core.latents import LatentStatistics
from mochi_core.shapes import VideoSize
from mochi_core.training.dataset import CLIPS, MANIFEST, Dataset, Entry, Manifest

STATISTICS = LatentStatistics((0.5, -0.25), (1.5, 2.0))
SIZE = VideoSize(32, 16, 7)
SHAPE = (2, 2, 2, 4)
NAMES = ("a-0000000000000000.safetensors", "b-1111111111111111.safetensors")


def entry(name="a.mp4", file=NAMES[0], **values):
    plain = dict(video="00", caption_hash="11", latents_of="22", features_of="33", file_hash="44")
    return Entry(**{**plain, **dict(source=name, start=0, width=32, height=16, frames=7), "file": file,
                    "caption": f"of {name}", **values})  # fmt: skip


def tensors(**values):
    return {"mean": torch.randn(SHAPE), "logvar": torch.randn(SHAPE), "features": torch.randn(5, 8), **values}


@pytest.fixture
def folder(tmp_path):
    """A dataset of two clips."""
    (tmp_path / CLIPS).mkdir()
    for file in NAMES:
        save_file(tensors(), tmp_path / CLIPS / file)
    manifest(entry("b.mp4", NAMES[1], start=7), entry()).write(tmp_path)
    return tmp_path


def manifest(*entries):
    return Manifest({"clips_per_video": 1}, {"vae": "sha256:0"}, STATISTICS, 8, entries)


def edited(folder, edit):
    values = json.loads((folder / MANIFEST).read_text())
    edit(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def test_open(folder):
    dataset = Dataset.open(folder)
    assert [clip.name for clip in dataset.clips] == ["a.mp4", "b.mp4 from frame 7"]
    assert dataset.clips[0].caption == "of a.mp4" and dataset.clips[0].size == SIZE
    assert dataset.clips[1].file == folder / CLIPS / NAMES[1]
    assert dataset.statistics == STATISTICS and dataset.text_width == 8


def test_a_manifest_says_what_was_written(folder):
    assert Manifest.read(folder) == manifest(entry("b.mp4", NAMES[1], start=7), entry())


def test_load(folder):
    given = tensors(features=torch.randn(0, 8))
    save_file(given, folder / CLIPS / NAMES[0])
    dataset = Dataset.open(folder)
    sample = dataset.load(dataset.clips[0])
    assert sample.name == "a.mp4"
    for name in ("mean", "logvar", "features"):
        assert torch.equal(getattr(sample, name), given[name])


def test_what_is_loaded_outlives_the_file(folder):
    dataset = Dataset.open(folder)
    mean = dataset.load(dataset.clips[0]).mean
    before = mean.clone()
    path = folder / CLIPS / NAMES[0]
    size = path.stat().st_size
    with path.open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(header)
        file.write(bytes(size - header))
    assert torch.equal(mean, before)


@pytest.mark.parametrize(
    "values, why",
    [
        (dict(mean=torch.zeros(2, 2, 2, 5)), "its mean is"),
        (dict(logvar=torch.zeros(3, 2, 2, 4)), "its logvar is"),
        (dict(mean=torch.zeros(SHAPE, dtype=torch.float16)), "its mean is"),
        (dict(logvar=torch.full(SHAPE, float("nan"))), "its logvar has values"),
        (dict(features=torch.full((5, 8), float("inf"))), "its features has values"),
        (dict(features=torch.zeros(5, 9)), "its features are"),
        (dict(features=torch.zeros(257, 8)), "its features are"),
        (dict(features=torch.zeros(5, 8, dtype=torch.int64)), "its features has values"),
        (dict(features=None), "its file has no features"),
    ],
)
def test_a_damaged_clip(folder, values, why):
    save_file({k: v for k, v in tensors(**values).items() if v is not None}, folder / CLIPS / NAMES[1])
    dataset = Dataset.open(folder)
    dataset.load(dataset.clips[0])
    with pytest.raises(DatasetError, match=f"The clip b.mp4 from frame 7 is damaged .{why}.*Run `prepare` again"):
        dataset.load(dataset.clips[1])


def test_a_truncated_file(folder):
    file = folder / CLIPS / NAMES[0]
    file.write_bytes(file.read_bytes()[:-9])
    dataset = Dataset.open(folder)
    with pytest.raises(DatasetError, match=r"The clip a.mp4 is damaged"):
        dataset.load(dataset.clips[0])


@pytest.mark.parametrize(
    "edit, why",
    [
        (lambda m: m["clips"][0].update(file="../../secret.safetensors"), "file name"),
        (lambda m: m["clips"][0].update(file="/etc/passwd"), "file name"),
        (lambda m: m["clips"][0].update(file="..\\a-0000000000000000.safetensors"), "file name"),
        (lambda m: m["clips"][0].update(file=NAMES[1] + "\n"), "file name"),
        (lambda m: m["clips"][0].update(file=["a"]), "file is list, not str"),
        (lambda m: m["clips"][0].update(file=m["clips"][1]["file"]), "two clips have one name"),
        (lambda m: m["clips"][0].update(width=33), "width is 33"),
        (lambda m: m["clips"][0].update(frames=True), "frames is bool, not int"),
        (lambda m: m["clips"][0].update(start=-1), "starts at frame -1"),
        (lambda m: m["clips"][0].pop("caption"), "caption"),
        (lambda m: m["clips"].append(7), "there is int where"),
        (lambda m: m.update(clips={}), "clips is dict, not list"),
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(format="other"), "'other'"),
        (lambda m: m["statistics"].update(std=[1.0]), "deviation"),
        (lambda m: m["statistics"].update(mean=["a", "b"]), "statistics"),
        (lambda m: m.update(text_width="8"), "text_width is str"),
    ],
)
def test_a_manifest_is_not_trusted(folder, edit, why):
    edited(folder, edit)
    with pytest.raises(DatasetError, match=r"manifest.json is damaged \(.*" + why.replace("(", r"\(")):
        Dataset.open(folder)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", '{"format": 1}', "\xff"])
def test_no_manifest_at_all(folder, text):
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(DatasetError, match=r"manifest.json (cannot be read|is damaged)"):
        Dataset.open(folder)


def test_no_dataset(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot be read .*prepare the clips first"):
        Dataset.open(tmp_path / "nothing")


def test_an_empty_dataset(folder):
    manifest().write(folder)
    with pytest.raises(DatasetError, match="has no clip"):
        Dataset.open(folder)


def test_an_unfinished_dataset(folder):
    edited(folder, lambda m: m["clips"][0].update(features_of=""))
    with pytest.raises(DatasetError, match=r"1 of 2 clips in .* such as b.mp4 from frame 7, lack features.*goes on"):
        Dataset.open(folder)


def test_a_missing_file(folder):
    (folder / CLIPS / NAMES[1]).unlink()
    with pytest.raises(DatasetError, match=r"1 clips .* such as that of b.mp4 from frame 7"):
        Dataset.open(folder)


def test_the_digest_is_of_what_is_learnt(folder):
    digest = Dataset.open(folder).digest
    assert Dataset.open(folder).digest == digest
    edited(folder, lambda m: m["clips"].reverse())
    edited(folder, lambda m: m["clips"][0].update(warnings=["it is small"]))
    assert Dataset.open(folder).digest == digest
    seen = {digest}
    for change in (dict(latents_of="x"), dict(features_of="x"), dict(source="z.mp4")):
        before = (folder / MANIFEST).read_bytes()
        edited(folder, lambda m, change=change: m["clips"][0].update(change))
        seen.add(Dataset.open(folder).digest)
        (folder / MANIFEST).write_bytes(before)
    edited(folder, lambda m: m["statistics"].update(mean=[0.0, 0.0]))
    seen.add(Dataset.open(folder).digest)
    assert len(seen) == 5


def test_a_model_that_belongs(folder):
    dataset = Dataset.open(folder)
    dataset.check(2, 8, STATISTICS)
    dataset.check(2, 8, LatentStatistics((0.5 + 1e-6, -0.25), (1.5, 2.0)))
    for arguments, why in (
        ((12, 8, STATISTICS), "latents of 2 channels: this model makes 12"),
        ((2, 9, STATISTICS), "features of width 8: this model reads 9"),
        ((2, 8, LatentStatistics((0.5, -0.2), (1.5, 2.0))), "other latent statistics"),
        ((2, 8, LatentStatistics((0.5, -0.25), (1.5, 2.1))), "other latent statistics"),
    ):
        with pytest.raises(DatasetError, match=why):
            dataset.check(*arguments)
