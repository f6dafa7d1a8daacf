"""A folder of clips becomes a LoRA in the real host: shown, stopped, gone on with, used."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from harness import TINY, Graph, RunningHost
from safetensors.torch import load_file

from mochi_core.training.metrics import NAME as METRICS
from mochi_core.training.metrics import read_metrics
from mochi_core.training.snapshot import snapshots
from mochi_core.training.tiny.classifier import classify
from mochi_core.training.tiny.scenes import Scene
from mochi_core.video_file import write_mp4
from scripts import on_tiny
from scripts.comfyui import PromptFailed, PromptRefused
from scripts.on_tiny import moving_disc

CAPTIONS = {"one": "a blue circle rising on a gray background", "two": ""}
CLIPS = "training_clips/"
PREPARED = {"width": 64, "height": 64, "frames": 13, "vae_name": TINY, "t5_name": TINY}
TRAINED = {"dit_name": TINY, "steps": 6, "rank": 4, "learning_rate": 1e-2, "batch_size": 2, "seed": 7, "warmup": 2}
CONTINUED = {"steps": 40, "save_every": 5}
SAMPLED = {"sample_every": 3, "sample_prompts": "a red circle\na blue box", "vae_name": TINY, "t5_name": TINY}


@pytest.fixture(scope="module", autouse=True)
def clips(host: RunningHost) -> Path:
    """Two videos with captions in the host's input folder, one without."""
    folder = host.base / "input" / CLIPS
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, caption) in enumerate(CAPTIONS.items()):
        write_mp4(folder / f"{name}.mp4", [moving_disc().flip(index)], 24)
        (folder / f"{name}.txt").write_text(caption)
    write_mp4(folder / "alone.mp4", [moving_disc()], 24)
    return folder


@pytest.fixture(scope="module")
def dataset(host: RunningHost, clips: Path) -> str:
    """The name of those clips as a dataset."""
    graph = Graph()
    preparing(graph)
    host.run(graph.nodes)
    return "discs"


def preparing(graph: Graph, **changed: Any) -> list[Any]:
    return graph.add("MochiVideoPrepareDataset", **({"folder": CLIPS, "name": "discs", **PREPARED} | changed))


def training(graph: Graph, name: str, **changed: Any) -> list[Any]:
    dataset = changed.pop("dataset", None) or preparing(graph)
    return graph.add("MochiVideoTrainLora", **({"dataset": dataset, "name": name, **TRAINED} | changed))


def folder_of(host: RunningHost, name: str) -> Path:
    return host.output / "mochi_training" / name


def losses(host: RunningHost, name: str) -> list[tuple[int, float]]:
    folder = folder_of(host, name)
    return [(line["step"], line["loss"]) for line in read_metrics(folder)] if (folder / METRICS).exists() else []


def told_of(host: RunningHost, graph: Graph) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The outputs of a graph, and all that the page was told while it ran."""
    seen: list[tuple[str, dict[str, Any]]] = []
    outputs = host.run(graph.nodes, lambda kind, data: seen.append((kind, data)))
    return outputs, seen


def stopped(host: RunningHost, graph: Graph, reached: Callable[[], bool]) -> None:
    """Runs a graph and interrupts it once this is so."""
    ended = threading.Event()

    def interrupt() -> None:
        while not reached() and not ended.wait(0.02):
            pass
        host.post("/interrupt", {})

    waiting = threading.Thread(target=interrupt)
    waiting.start()
    try:
        with pytest.raises(PromptFailed) as failed:
            host.run(graph.nodes)
    finally:
        ended.set()
        waiting.join()
    assert failed.value.kind == "execution_interrupted"


def test_clips_become_a_lora_that_the_host_lists_and_the_page_sees_it_happen(host: RunningHost, graph: Graph) -> None:
    train = training(graph, "whole", **SAMPLED)
    prepare, _ = graph.nodes[train[0]]["inputs"]["dataset"]
    outputs, seen = told_of(host, graph)

    (report,) = outputs[prepare]["text"]
    assert "2 prepared" in report and "alone.mp4 has no caption" in report
    assert (host.output / "mochi_datasets" / "discs" / "manifest.json").is_file()
    progress = [data for kind, data in seen if kind == "progress"]
    assert {data["node"] for data in progress} == {prepare, train[0]}
    assert [data["value"] for data in progress if data["node"] == train[0]][-1] == 6

    told = [data for kind, data in seen if kind == "mochi_video.training"]
    assert all(data["node"] == train[0] for data in told)
    assert told[0]["state"] == "running" and told[-1]["state"] == "finished"
    assert [step for step, _ in told[-1]["curve"]] == [1, 2, 3, 4, 5, 6]
    assert told[-1]["lora"] == "loras/whole.safetensors"
    assert [sample["step"] for sample in told[-1]["samples"]] == [3, 6]
    for sample in told[-1]["samples"]:
        assert (host.output / sample["subfolder"] / sample["filename"]).is_file() and sample["type"] == "output"
    (kept,) = outputs[train[0]]["mochi_video_training"]
    assert kept == {name: value for name, value in told[-1].items() if name not in ("node", "prompt_id")}

    written = load_file(host.output / "loras" / "whole.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in written.items() if name.endswith("lora_B"))
    assert json.dumps(host.get("/object_info/MochiVideoLoraLoader")).count("whole.safetensors") == 1


def test_the_same_again_is_there_at_once(host: RunningHost) -> None:
    first, again = Graph(), Graph()
    training(first, "again")
    host.run(first.nodes)
    written = (host.output / "loras" / "again.safetensors").read_bytes()
    host.post("/free", {"free_memory": True})  # the host has forgotten that it ran
    training(again, "again")
    _, seen = told_of(host, again)
    told = [data for kind, data in seen if kind == "mochi_video.training"]
    assert [data["state"] for data in told] == ["finished"] and told[0]["step"] == 6
    assert (host.output / "loras" / "again.safetensors").read_bytes() == written


def test_stopped_in_the_middle_it_goes_on_from_there_as_if_it_never_had(host: RunningHost) -> None:
    whole, first, rest = Graph(), Graph(), Graph()
    training(whole, "uninterrupted", **CONTINUED)
    host.run(whole.nodes)
    training(first, "interrupted", **CONTINUED)
    stopped(host, first, lambda: len(losses(host, "interrupted")) >= 4)
    done = losses(host, "interrupted")
    folder = folder_of(host, "interrupted")
    assert 4 <= len(done) < 40
    assert snapshots(folder)[-1].name == f"step_{len(done):08d}.safetensors"
    assert (folder / "final.lora.safetensors").is_file()
    assert not (host.output / "loras" / "interrupted.safetensors").exists(), "it is not finished"

    training(rest, "interrupted", **CONTINUED)
    _, seen = told_of(host, rest)
    steps = [data["step"] for kind, data in seen if kind == "mochi_video.training"]
    assert steps[0] == len(done) + 1 and steps[-1] == 40
    assert losses(host, "interrupted") == losses(host, "uninterrupted")
    ours, theirs = (load_file(host.output / "loras" / f"{n}.safetensors") for n in ("interrupted", "uninterrupted"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_sample_can_be_interrupted_and_is_made_no_more(host: RunningHost, graph: Graph) -> None:
    sampled = SAMPLED | {"sample_every": 3, "sample_steps": 1000}
    training(graph, "sampled", **sampled)
    stopped(host, graph, lambda: len(losses(host, "sampled")) == 3)
    folder = folder_of(host, "sampled")
    assert [path.name for path in snapshots(folder)] == ["step_00000003.safetensors"]
    assert not (folder / "samples").exists()


def test_clips_that_were_prepared_before_it_was_stopped_stay(host: RunningHost) -> None:
    first, again = Graph(), Graph()
    preparing(first, folder="mochi-video-example", name="stopped")
    clips = host.output / "mochi_datasets" / "stopped" / "clips"
    stopped(host, first, lambda: len(list(clips.glob("*.safetensors"))) >= 3)
    node, _ = preparing(again, folder="mochi-video-example", name="stopped")
    (report,) = host.run(again.nodes)[node]["text"]
    prepared, unchanged = (int(count) for count in re.findall(r"(\d+) (?:prepared|unchanged)", report))
    assert prepared + unchanged == 20 and prepared > 0


def test_the_host_s_own_loader_takes_it_and_gives_what_our_loader_gives(host: RunningHost, graph: Graph) -> None:
    lora = training(graph, "used")
    model = graph.dit()
    graph.probe("Latent", graph.sampler(model=model), "without")
    theirs = graph.add("LoraModelLoader", model=model, lora=lora, strength_model=1.0, bypass=False)
    graph.probe("Latent", graph.sampler(model=theirs), "theirs")
    without, with_it = host.tensors(graph, "without", "theirs")
    ours = Graph()
    loaded = ours.add("MochiVideoLoraLoader", model=ours.dit(), lora_name="used.safetensors", strength=1.0)
    ours.probe("Latent", ours.sampler(model=loaded), "ours")
    assert not torch.allclose(without["samples"], with_it["samples"], atol=1e-3)
    assert (host.tensors(ours, "ours")["samples"] - with_it["samples"]).abs().max() <= 1e-5


def test_the_workflow_teaches_the_embedded_model_a_motion_that_it_lacks(host: RunningHost) -> None:
    prompt = on_tiny.read("train_lora_tiny")
    for node in prompt.values():  # other tests have run it in a shorter form
        if "name" in node["inputs"]:
            node["inputs"]["name"] += "-whole"
    (path,) = host.saved(host.run(prompt))
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    before, after = torch.tensor(np.stack(frames)).float().div(255).chunk(2, dim=2)
    assert classify(before).motion != "zigzag"
    assert classify(after) == Scene("red", "circle", "black", "zigzag")


def test_the_host_s_own_node_saves_it(host: RunningHost, graph: Graph) -> None:
    graph.add("SaveLoRA", lora=training(graph, "saved"), prefix="loras/by_the_host")
    host.run(graph.nodes)
    (path,) = (host.output / "loras").glob("by_the_host*.safetensors")
    ours = load_file(host.output / "loras" / "saved.safetensors")
    assert load_file(path).keys() == ours.keys()


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        ("prepare", {"folder": "nowhere/"}, "folder is 'nowhere/': it must be a folder with videos in"),
        ("prepare", {"folder": "empty/"}, "it must be a folder with videos in"),
        ("prepare", {"folder": "uncaptioned/"}, "none of its 1 videos has a caption"),
        ("prepare", {"name": "../elsewhere"}, "name is '../elsewhere': it must be plain"),
        ("prepare", {"name": ""}, "name is '': it must be plain"),
        ("prepare", {"frames": 12}, "frames is 12: it must be 6k+1"),
        ("prepare", {"width": 100}, "width is 100: it must be a positive multiple of 16"),
        ("prepare", {"vae_name": "no.safetensors"}, "there is no such file in models/vae"),
        ("prepare", {"t5_name": "no.safetensors", "vae_name": "nor.safetensors"}, "nor.safetensors"),
        ("train", {"dataset": "../../elsewhere"}, "it must be the name of a folder in"),
        ("train", {"dataset": "/etc"}, "it must be the name of a folder in"),
        ("train", {"dataset": "not-prepared"}, "a dataset is a folder that `prepare` has written"),
        ("train", {"name": "a/b"}, "name is 'a/b': it must be plain"),
        ("train", {"name": "CON"}, "name is 'CON': it must be plain"),
        ("train", {"dit_name": "no.safetensors"}, "there is no such file in models/diffusion_models"),
        ("train", {"steps": 0}, "steps is 0: it must be from 1"),
        ("train", {"base": "q3"}, "base is 'q3': it must be one of keep"),
        ("train", SAMPLED | {"vae_name": "none"}, "sample_every is 3 without vae_name"),
        ("train", SAMPLED | {"sample_prompts": " \n"}, "sample_every is 3 without sample_prompts"),
    ],
)
def test_what_cannot_be_is_refused_when_queued(
    host: RunningHost, graph: Graph, dataset: str, kind: str, changed: dict[str, Any], said: str
) -> None:
    for name in ("empty", "uncaptioned"):
        (host.base / "input" / name).mkdir(exist_ok=True)
    write_mp4(host.base / "input" / "uncaptioned" / "alone.mp4", [moving_disc()], 24)
    named = {"name": "refused", "dataset": dataset}
    node, _ = preparing(graph, **changed) if kind == "prepare" else training(graph, **(named | changed))
    with pytest.raises(PromptRefused) as refused:
        host.run(graph.nodes)
    errors = refused.value.answer["node_errors"][node]["errors"]
    assert any(said in error["details"] for error in errors), errors


def test_other_settings_under_the_same_name_say_what_changed(host: RunningHost) -> None:
    first, other = Graph(), Graph()
    training(first, "settings")
    host.run(first.nodes)
    training(other, "settings", rank=8)
    with pytest.raises(PromptFailed) as failed:
        host.run(other.nodes)
    said = failed.value.message["exception_message"]
    assert "task.lora.qkv.rank was 4 and is 8" in said and "choose another name" in said


def test_what_is_wrong_with_the_training_is_said_before_the_clips_are_prepared(host: RunningHost, graph: Graph) -> None:
    """The host runs what it can all the same: the dataset is of use by itself."""
    node, _ = training(graph, "../elsewhere")
    status, answer = host.answer({"prompt": graph.nodes, "client_id": host.client})
    assert status == 200 and list(answer["node_errors"]) == [node]


def test_a_lora_of_somebody_else_is_never_replaced(host: RunningHost, graph: Graph, dataset: str) -> None:
    theirs = host.output / "loras" / "theirs.safetensors"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_bytes(b"precious")
    training(graph, "theirs", dataset=dataset)
    with pytest.raises(PromptRefused, match="nothing is replaced unasked"):
        host.run(graph.nodes)
    assert theirs.read_bytes() == b"precious"
    theirs.unlink()


def test_a_dataset_can_be_named_and_what_is_prepared_is_not_prepared_again(host: RunningHost) -> None:
    first, again, named = Graph(), Graph(), Graph()
    preparing(first, name="twice")
    host.run(first.nodes)
    node, _ = preparing(again, name="twice", budget_gb=500.0)
    (report,) = host.run(again.nodes)[node]["text"]
    assert "0 prepared, 2 unchanged, 1 skipped" in report
    training(named, "named", dataset="twice")
    host.run(named.nodes)
    assert (host.output / "loras" / "named.safetensors").is_file()


def test_a_new_caption_is_seen(host: RunningHost, clips: Path) -> None:
    first, again = Graph(), Graph()
    preparing(first, name="captions")
    host.run(first.nodes)
    (clips / "one.txt").write_text("a green box falling on a black background")
    try:
        node, _ = preparing(again, name="captions")
        (report,) = host.run(again.nodes)[node]["text"]
        assert "1 prepared, 1 unchanged" in report
    finally:
        (clips / "one.txt").write_text(CAPTIONS["one"])
