"""What the page is told and may ask: previews, warnings, costs, the player's files, lists of prompts."""

import json
import os
import urllib.error
import urllib.parse
from pathlib import Path
from typing import Any

import av
import pytest
from harness import PROMPT, TINY, Graph, RunningHost, found_inside

from scripts import comfyui


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return found_inside("in_process_page.py")


def test_a_strip_holds_all_pictures_as_long_as_the_clip_and_is_never_large(found: dict[str, Any]) -> None:
    released, single, longest = (found["strips"][name] for name in ("released", "single", "longest"))
    assert released["count"] == 28 and released["picture"] == [106, 60]
    assert single["count"] == 1
    assert longest["count"] == 52 and longest["picture"] == [80, 160]
    assert all(strip["fits"] for strip in found["strips"].values())
    assert released["seconds"] == pytest.approx(28 / 5) and longest["seconds"] == pytest.approx(257 / 5)
    assert released["characters"] < 400_000 and longest["characters"] < 1_000_000  # of noise, the worst there is


def test_each_picture_of_a_strip_lies_where_its_number_says(found: dict[str, Any]) -> None:
    assert found["worst_colour"] <= 6


def test_previews_come_twice_a_second_and_at_the_end(found: dict[str, Any]) -> None:
    assert found["paced"] == {"sent": [1, 5, 9, 13, 17, 20], "called": 20, "steps": 20}


def test_a_training_that_goes_on_is_told_whole_and_no_more_often_than_can_be_seen(found: dict[str, Any]) -> None:
    told = found["trained"]
    shown = {"filename": "step_000500.mp4", "subfolder": "mochi_training/some/samples", "type": "output", "step": 500}
    assert told["first"] == [503, [503, 1.0], [shown]]
    assert told["told"] == 250 + 2  # each second step, the sample, and the end
    count, first, last = told["curve"]
    assert 100 < count <= 240 and first[1] == 1.0 and last == [1000, 0.5]
    assert told["samples"] == [500, 1000] and told["pace"] == 0.25


def test_names_of_datasets_and_trainings_are_those_that_every_system_takes(found: dict[str, Any]) -> None:
    assert found["names"] == ["my-style", "3 things_v1.2", "Ünïcode 名"]


def test_a_host_without_what_a_training_runs_on_says_what_to_install(found: dict[str, Any]) -> None:
    assert "requirements.txt" in found["not_installed"]


def test_the_time_of_a_step_leaves_out_the_loading_and_grows_with_the_work(found: dict[str, Any]) -> None:
    times = found["timed"]
    assert times["median"] == times["same"] == 1.0
    assert times["before"] is None and times["other"] is None
    assert times["pair"] == pytest.approx(2.0)
    assert times["larger"] > 28 * 60 * 106 / (4 * 8 * 8), "attention grows faster than the tokens"


def test_warnings_of_ours_reach_the_page_that_queued_the_prompt(found: dict[str, Any]) -> None:
    expected = {"node": "12:5", "prompt_id": "prompt", "text": 600}
    assert found["warned"] == [["mochi_video.warning", expected, "page"]]


def told(host: RunningHost, graph: Graph, event: str) -> list[dict[str, Any]]:
    heard: list[dict[str, Any]] = []
    host.run(graph.nodes, lambda kind, data: heard.append(data) if kind == event else None)
    return heard


@pytest.mark.parametrize("advanced", [False, True], ids=["our sampler", "the host's with our guider"])
def test_sampling_sends_previews_of_the_whole_clip(host: RunningHost, graph: Graph, advanced: bool) -> None:
    seed = 71 + advanced
    if advanced:
        positive, negative = graph.prompts()
        options = {"cfg": 4.0, "cfg_schedule": "", "batch_cfg": True}
        guider = graph.add("MochiVideoGuider", model=graph.dit(), positive=positive, negative=negative, **options)
        schedule = {"steps": 4, "threshold_noise": 0.025, "linear_steps": 0, "denoise": 1.0}
        sampled = graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("RandomNoise", noise_seed=seed),
            guider=guider,
            sampler=graph.add("KSamplerSelect", sampler_name="euler"),
            sigmas=graph.add("MochiVideoSigmas", preset="custom", **schedule),
            latent_image=graph.size(),
        )
    else:
        sampled = graph.sampler(seed=seed)
    graph.probe("Latent", sampled, "latents")
    previews = told(host, graph, "mochi_video.preview")
    assert previews[-1]["step"] == previews[-1]["steps"] == 4
    assert all(preview["count"] == 3 and preview["node"] == sampled[0] for preview in previews)


def test_a_cut_prompt_is_told_to_the_page(host: RunningHost, graph: Graph) -> None:
    graph.probe("Conditioning", graph.text(graph.t5(), " ".join(f"word{index}" for index in range(900))), "out")
    (warning,) = told(host, graph, "mochi_video.warning")
    assert "The prompt is longer than 256 tokens" in warning["text"]
    assert graph.nodes[warning["node"]]["class_type"] == "MochiVideoTextEncode"


def cost(host: RunningHost, **query: Any) -> dict[str, Any]:
    return host.get(f"/mochi_video/cost?{urllib.parse.urlencode(query)}")


def test_the_cost_of_a_size_is_known_before_anything_runs(host: RunningHost) -> None:
    tiny = cost(host, width=64, height=64, frames=19, dit_name=TINY)
    assert tiny["tokens"] == 64 and tiny["verdict"] == "fits" and tiny["blocks"] == 4 and tiny["dit_known"]
    released = cost(host, width=848, height=480, frames=163)
    assert released["tokens"] == 44_520 and released["blocks"] == 48 and not released["dit_known"]
    assert released["sampling_bytes"] > 1e9 and released["decode_bytes"] > 1e9
    assert cost(host, width=4096, height=4096, frames=1537)["verdict"] == "too_large"
    assert cost(host, width=64, height=64, frames=19, dit_name=TINY, memory="streamed")["verdict"] == "streams"


def test_after_a_run_the_cost_knows_the_time(host: RunningHost, graph: Graph) -> None:
    graph.probe("Latent", graph.sampler(seed=73), "latents")
    host.run(graph.nodes)
    seconds = cost(host, width=64, height=64, frames=13, dit_name=TINY)["seconds_a_step"]
    assert 0 < seconds < 60
    assert cost(host, width=128, height=128, frames=37, dit_name=TINY)["seconds_a_step"] > 4 * seconds


def test_a_second_copy_of_the_pack_does_no_harm(host: RunningHost, tmp_path: Path) -> None:
    for name in ("mochi-video", "mochi-video-copy"):
        (tmp_path / "custom_nodes").mkdir(exist_ok=True)
        (tmp_path / "custom_nodes" / name).symlink_to(comfyui.REPO, target_is_directory=True)
    with RunningHost(tmp_path, tmp_path / "output", tmp_path / "log") as both:
        assert cost(both, width=64, height=64, frames=19, dit_name=TINY)["verdict"] == "fits"
        assert "MochiVideoSampler" in both.get("/object_info")


def test_questions_leave_no_trace_in_the_hosts_list_of_folders(host: RunningHost) -> None:
    cost(host, width=64, height=64, frames=19, dit_name=TINY)
    assert not [folder for folder in host.get("/models") if "mochi" in folder]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"width": 64, "height": 64, "frames": 20}, "frames is 20: it must be 6k+1"),
        ({"width": 100, "height": 64, "frames": 19}, "width is 100: it must be a positive multiple of 16"),
        ({"width": "x", "height": 64, "frames": 19}, "width is 'x': it must be a whole number"),
        ({"width": 10**20, "height": 64, "frames": 19}, "it must be a whole number"),
        ({"height": 64, "frames": 19}, "width is None"),
        ({"width": 64, "height": 64, "frames": 19, "memory": "all"}, "memory is 'all': it must be one of auto"),
        ({"width": 64, "height": 64, "frames": 19, "batch_size": 65}, "batch_size is 65: it must be from 1 to 64"),
    ],
)
def test_a_question_that_has_no_answer_says_why(host: RunningHost, query: dict[str, Any], said: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        cost(host, **query)
    assert refused.value.code == 400
    assert said in json.loads(refused.value.read())["error"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", "x" * 5000])
def test_names_that_are_no_files_of_the_host_are_the_released_model(host: RunningHost, name: str) -> None:
    assert not cost(host, width=64, height=64, frames=19, dit_name=name)["dit_known"]


def decoded(host: RunningHost, graph: Graph, **options: Any) -> list[dict[str, Any]]:
    link = graph.decode(graph.sampler(graph.size(batch_size=2)), **options)
    graph.probe("Image", link, "frames")
    return host.run(graph.nodes).get(link[0], {}).get("mochi_video", [])


def test_the_player_gets_a_file_of_each_clip_that_carries_the_prompt(host: RunningHost, graph: Graph) -> None:
    files = decoded(host, graph, fps=24.0, player=True)
    assert len(files) == 2
    for file in files:
        assert file["type"] == "temp" and file["frames"] == 13 and [file["width"], file["height"]] == [64, 64]
        path = host.base / "temp" / file["subfolder"] / file["filename"]
        with av.open(str(path)) as video:
            assert sum(1 for _ in video.decode(video=0)) == 13 and video.streams.video[0].average_rate == 24
            made_by = json.loads(video.metadata["prompt"])
        assert {name: node["inputs"] for name, node in made_by.items()} == {
            name: node["inputs"] for name, node in graph.nodes.items()
        }


def test_the_players_files_do_not_fill_the_disk(host: RunningHost, graph: Graph) -> None:
    folder = host.base / "temp" / "mochi_video"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(80):
        old = folder / f"old_{index}.mp4"
        old.touch()
        os.utime(old, (index, index))
    files = decoded(host, graph, fps=26.0, player=True)
    left = {path.name for path in folder.glob("*.mp4")}
    assert len(left) == 64 and {file["filename"] for file in files} <= left
    assert "old_0.mp4" not in left and "old_79.mp4" in left


def test_without_the_player_no_file_is_written(host: RunningHost, graph: Graph) -> None:
    before = set((host.base / "temp").rglob("*.mp4"))
    assert decoded(host, graph, fps=25.0, player=False) == []
    assert set((host.base / "temp").rglob("*.mp4")) == before


def test_a_list_of_prompts_and_seeds_makes_as_many_videos(host: RunningHost, graph: Graph) -> None:
    text = f"{PROMPT}\n\n  a green box rising on a black background  \n"
    prompts = graph.add("MochiVideoPrompts", prompts=text, seed=2**64 - 1, seeds_per_prompt=2)
    positive = graph.text(graph.t5(), prompts)
    latent = graph.sampler(positive=positive, negative=graph.text(graph.t5(), ""), seed=graph.out(prompts, 1), steps=2)
    video = graph.out(graph.decode(latent), 1)
    saved = graph.add("SaveVideo", video=video, filename_prefix="video/listed", format="mp4", codec="h264")
    files = host.saved(host.run(graph.nodes))
    assert len(files) == 4 == len(set(files)) and saved
    with av.open(str(files[0])) as one, av.open(str(files[1])) as other:
        first, second = ([frame.to_ndarray() for frame in video.decode(video=0)] for video in (one, other))
    assert len(first) == 13 and any((a != b).any() for a, b in zip(first, second))


@pytest.mark.parametrize("text", ["", " \n\n "])
def test_no_prompt_at_all_is_refused_when_queued(host: RunningHost, graph: Graph, text: str) -> None:
    prompts = graph.add("MochiVideoPrompts", prompts=text, seed=0, seeds_per_prompt=1)
    graph.probe("Conditioning", graph.text(graph.t5(), prompts), "out")
    with pytest.raises(comfyui.PromptRefused, match="Write one prompt on each line"):
        host.queue(graph.nodes)
