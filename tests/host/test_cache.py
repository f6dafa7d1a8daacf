"""What a changed prompt runs again, and what it does not: counted by the nodes that the host says it runs."""

import copy
import json
import os
from collections.abc import Iterator
from typing import Any

import av
import pytest
from harness import RunningHost, workflow

from mochi_core.weights.build import TINY_DIT

LOADERS = {"MochiVideoT5Loader", "MochiVideoDiTLoader", "MochiVideoVAELoader"}
T5, DIT, PROMPT, SIZE, SAMPLER, DECODE, SAVE = "1", "2", "4", "6", "7", "8", "9"


@pytest.fixture
def ran(host: RunningHost) -> Iterator[dict[str, Any]]:
    """The tiny workflow as an API prompt, which the host has just run and keeps in its cache."""
    prompt = workflow("text_to_video_tiny")
    prompt[SAMPLER]["inputs"]["steps"] = 4
    host.run(prompt)
    yield prompt
    host.run(prompt)  # so that nothing of a test's own is in the cache of the next


def changed(prompt: dict[str, Any], node: str, **inputs: Any) -> dict[str, Any]:
    other = copy.deepcopy(prompt)
    other[node]["inputs"].update(inputs)
    return other


def test_the_same_prompt_again_runs_nothing(host: RunningHost, ran: dict[str, Any]) -> None:
    cached: list[str] = []
    outputs = host.run(ran, lambda kind, data: cached.extend(data["nodes"]) if kind == "execution_cached" else None)
    assert sorted(cached) == sorted(ran)
    assert host.executed(ran) == []
    (video,) = host.saved(outputs)
    assert video.is_file(), "the client is still told where the video is"


def test_without_a_client_id_the_host_forgets_the_files_of_a_cached_prompt(
    host: RunningHost, ran: dict[str, Any]
) -> None:
    with host.events() as socket:
        ids = [host.post("/prompt", {"prompt": ran})["prompt_id"], host.queue(changed(ran, SAMPLER, seed=50))]
        assert ids[1] in host.each_finished(socket, ids[1:])
    assert host.get(f"/history/{ids[0]}")[ids[0]]["outputs"] == {}


def test_another_prompt_encodes_only_itself_and_loads_no_model(host: RunningHost, ran: dict[str, Any]) -> None:
    again = host.executed(changed(ran, PROMPT, text="a green triangle rising on a black background"))
    assert again == ["MochiVideoTextEncode", "MochiVideoSampler", "MochiVideoDecode", "SaveVideo"]


def test_another_seed_encodes_no_text_and_loads_no_model(host: RunningHost, ran: dict[str, Any]) -> None:
    assert host.executed(changed(ran, SAMPLER, seed=41)) == ["MochiVideoSampler", "MochiVideoDecode", "SaveVideo"]


@pytest.mark.parametrize(
    "options", [{"mode": "full"}, {"fps": 24.0}, {"mode": "tiled spatial", "tile_columns": 2}], ids=str
)
def test_another_way_to_decode_samples_nothing(host: RunningHost, ran: dict[str, Any], options: dict[str, Any]) -> None:
    assert host.executed(changed(ran, DECODE, **options)) == ["MochiVideoDecode", "SaveVideo"]


def test_another_size_encodes_no_text_and_loads_no_model(host: RunningHost, ran: dict[str, Any]) -> None:
    again = host.executed(changed(ran, SIZE, frames=7))
    assert again == ["MochiVideoSize", "MochiVideoSampler", "MochiVideoDecode", "SaveVideo"]


def test_another_file_name_only_saves(host: RunningHost, ran: dict[str, Any]) -> None:
    assert host.executed(changed(ran, SAVE, filename_prefix="video/renamed")) == ["SaveVideo"]


def test_other_options_of_one_loader_load_only_its_model(host: RunningHost, ran: dict[str, Any]) -> None:
    again = host.executed(changed(ran, DIT, attention="sdpa"))
    assert again == ["MochiVideoDiTLoader", "MochiVideoSampler", "MochiVideoDecode", "SaveVideo"]
    again = host.executed(changed(ran, T5, dtype="float32"))
    assert set(again) & LOADERS == {"MochiVideoT5Loader", "MochiVideoDiTLoader"}, "the DiT is the first one's again"


def test_a_file_that_changed_on_disk_is_loaded_again_and_others_are_not(host: RunningHost, ran: dict[str, Any]) -> None:
    file = host.models / "diffusion_models" / "cached.safetensors"
    file.write_bytes(TINY_DIT.read_bytes())
    prompt = changed(ran, DIT, dit_name=file.name)
    host.run(prompt)
    assert host.executed(prompt) == []
    os.utime(file, (1, 1))
    again = host.executed(prompt)
    assert again == ["MochiVideoDiTLoader", "MochiVideoSampler", "MochiVideoDecode", "SaveVideo"]


def test_a_prompt_with_the_hosts_own_mark_in_it_does_not_see_that_a_file_changed(
    host: RunningHost, ran: dict[str, Any]
) -> None:
    file = host.models / "diffusion_models" / "marked.safetensors"
    file.write_bytes(TINY_DIT.read_bytes())
    prompt = changed(ran, DIT, dit_name=file.name)
    (video,) = host.saved(host.run(prompt))
    with av.open(str(video)) as container:
        marked = json.loads(container.metadata["prompt"])
    assert "is_changed" in marked[DIT]
    os.utime(file, (1, 1))
    assert host.executed(marked) == []
    del marked[DIT]["is_changed"]
    assert "MochiVideoDiTLoader" in host.executed(marked)


def test_after_memory_was_freed_everything_runs_again_and_works(host: RunningHost, ran: dict[str, Any]) -> None:
    host.post("/free", {"unload_models": True, "free_memory": True})
    again = host.executed(ran)
    assert sorted(again) == sorted(node["class_type"] for node in ran.values())
