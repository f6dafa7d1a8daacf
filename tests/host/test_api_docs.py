"""The scripts in `docs/api.md` as they stand there: they make a video, say what is wrong, and can be cancelled."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
from harness import Graph, RunningHost, workflow

from scripts import comfyui

PAGE = (comfyui.REPO / "docs" / "api.md").read_text(encoding="utf-8")
SCRIPTS = {"python": ("client.py", sys.executable), "sh": ("client.sh", "sh")}
TEXT = 'a "green" triangle\'s rise, 绿色 🔺'

clients = pytest.mark.parametrize("language", SCRIPTS)


REFUSED = "What a refused prompt looks like"


def section(heading: str) -> str:
    _, _, after = PAGE.partition(f"\n## {heading}\n")
    assert after, heading
    return after.split("\n## ")[0]


def block(language: str, heading: str) -> str:
    """The first code block of this language below a heading of the page."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section(heading), re.MULTILINE | re.DOTALL)
    return next(content for kind, content in blocks if kind == language)


def command(language: str, folder: Path, prompt: dict[str, Any], text: str = TEXT, seed: str = "7") -> list[str]:
    """Writes client and prompt into the folder and says how to start it."""
    name, program = SCRIPTS[language]
    script, file = folder / name, folder / "prompt.json"
    script.write_text(block(language, {"python": "In Python", "sh": "In a shell"}[language]), encoding="utf-8")
    file.write_text(json.dumps(prompt), encoding="utf-8")
    return [program, str(script), str(file), text, seed]


def environment(host: RunningHost) -> dict[str, str]:
    return os.environ | {"COMFYUI": f"127.0.0.1:{host.port}", "PYTHONUNBUFFERED": "1"}


def run(host: RunningHost, folder: Path, started: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        started, cwd=folder, env=environment(host), capture_output=True, text=True, encoding="utf-8", timeout=100
    )


def short() -> dict[str, Any]:
    prompt = workflow("text_to_video_tiny")
    prompt["7"]["inputs"]["steps"] = 4
    return prompt


@clients
def test_a_client_makes_a_video_of_the_prompt_and_the_seed(host: RunningHost, tmp_path: Path, language: str) -> None:
    done = run(host, tmp_path, command(language, tmp_path, short()))
    assert done.returncode == 0, done.stderr
    (video,) = tmp_path.glob("*.mp4")
    with av.open(str(video)) as container:
        assert [frame.width for frame in container.decode(video=0)] == [64] * 19
        made_of = json.loads(container.metadata["prompt"])
    assert made_of["4"]["inputs"]["text"] == TEXT
    assert made_of["7"]["inputs"]["seed"] == 7
    if language == "python":
        assert "node 7: 4 of 4" in done.stdout and str(video) in done.stdout


@clients
def test_a_client_says_what_the_host_refuses_node_by_node(host: RunningHost, tmp_path: Path, language: str) -> None:
    prompt = short()
    prompt["6"]["inputs"]["frames"], prompt["8"]["inputs"]["mode"] = 26, "magic"
    done = run(host, tmp_path, command(language, tmp_path, prompt))
    assert done.returncode == 1
    assert re.search(r"node 6 \(?MochiVideoSize.*frames is 26: it must be 6k\+1", done.stderr), done.stderr
    assert re.search(r"node 8 \(?MochiVideoDecode.*mode is 'magic': it must be one of", done.stderr)
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.mp4"))


@clients
def test_a_client_says_what_is_wrong_with_a_prompt_as_a_whole(host: RunningHost, tmp_path: Path, language: str) -> None:
    prompt = short()
    prompt["7"]["class_type"] = "MochiVideoNothing"
    done = run(host, tmp_path, command(language, tmp_path, prompt))
    assert done.returncode == 1
    assert "node MochiVideoNothing does not exist. Node ID '#7'" in done.stderr
    assert "Traceback" not in done.stderr


@clients
def test_a_client_says_which_node_failed_while_it_ran(host: RunningHost, tmp_path: Path, language: str) -> None:
    (host.models / "diffusion_models" / "damaged.safetensors").write_bytes(b"no weights")
    prompt = short()
    prompt["2"]["inputs"]["dit_name"] = "damaged.safetensors"
    done = run(host, tmp_path, command(language, tmp_path, prompt))
    assert done.returncode == 1
    assert re.search(r"node 2 \(?MochiVideoDiTLoader\)?: .*a weight file must be a whole safetensors", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends the signal of Ctrl-C")
@clients
def test_ctrl_c_cancels_what_runs(host: RunningHost, tmp_path: Path, language: str) -> None:
    prompt = short()
    prompt["6"]["inputs"] |= {"preset": "custom", "width": 192, "height": 192, "frames": 61}
    prompt["7"]["inputs"]["steps"] = 500
    started = command(language, tmp_path, prompt)
    with host.events() as socket:
        client = subprocess.Popen(
            started,
            cwd=tmp_path,
            env=environment(host),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert client.stdout and client.stdout.readline().startswith("queued as ")
        while not host.get("/queue")["queue_running"]:  # what only waits leaves no history
            time.sleep(0.05)
        os.killpg(client.pid, signal.SIGINT)  # as a terminal does it
        _, said = client.communicate(timeout=30)
        assert client.returncode != 0 and "Traceback" not in said, said
        left = (data["status"]["exec_info"]["queue_remaining"] for kind, data in host.told(socket) if kind == "status")
        assert 1 in left and 0 in left
    (entry,) = host.get("/history?max_items=1").values()
    assert entry["prompt"][2]["7"]["inputs"]["steps"] == 500
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    assert not list(tmp_path.glob("*.mp4"))


def test_the_refusal_on_the_page_is_what_the_host_and_the_client_say(host: RunningHost, tmp_path: Path) -> None:
    prompt = workflow("text_to_video_tiny")
    prompt["7"]["inputs"]["noise_device"] = "tpu"
    status, answer = host.answer({"prompt": prompt})
    assert status == 400
    assert json.loads(block("json", REFUSED)) == answer
    done = run(host, tmp_path, command("python", tmp_path, prompt))
    assert (done.returncode, done.stderr) == (1, block("", REFUSED))


def test_the_loop_over_seeds_on_the_page_queues_each_of_them(host: RunningHost) -> None:
    posted: list[int] = []
    ids: list[int] = []

    def queue(prompt: dict[str, Any]) -> int:
        posted.append(prompt["7"]["inputs"]["seed"])
        return len(posted)

    names = {"prompt": workflow("text_to_video_tiny"), "queue": queue, "ids": ids}
    exec(block("python", "Many seeds"), names)  # noqa: S102 - the page is ours
    assert posted == list(range(50)) and ids == list(range(1, 51))


def test_the_socket_says_what_the_page_lists_in_that_order(host: RunningHost) -> None:
    prompt = short()
    prompt["9"]["inputs"]["filename_prefix"] = "video/socket"
    prompt["7"]["inputs"]["seed"] = 123
    kinds: list[str] = []
    host.run(prompt, lambda kind, data: kinds.append(kind) if "prompt_id" in data else None)
    rows = re.findall(r"^\| `([a-z_]+)`.* \|$", section("What the socket says"), re.MULTILINE)
    happened = [row for row in rows if row not in ("type", "execution_error", "execution_interrupted")]
    assert kinds[:2] == happened[:2] == ["execution_start", "execution_cached"]
    of_the_host = {kind for kind in kinds if not kind.startswith("mochi_video.")}
    assert of_the_host - {"progress_state"} == {*happened}
    assert [kind for kind in kinds if kind in happened][-3:] == ["executed", "execution_success", "executing"]


def test_what_the_page_lists_to_post_does_what_it_says(host: RunningHost) -> None:
    """Routes and bodies of the table are taken from the page; what they do is counted."""
    rows = dict(re.findall(r"^\| (.*?) \| (`/.*`) \|$", section("Stop, and free memory"), re.MULTILINE))
    assert len(rows) == 5

    def post(what: str, **replaced: str) -> None:
        (row,) = [row for start, row in rows.items() if start.startswith(what)]
        route, body = re.findall(r"`(.*?)`", row)
        host.post(route, json.loads(body.replace("...", replaced.get("id", ""))))

    def long(seed: int) -> dict[str, Any]:
        graph = Graph()
        graph.probe("Latent", graph.sampler(graph.size(frames=61, width=128), steps=300, seed=seed), "long")
        return graph.nodes

    with host.events() as socket:
        first, second, third, fourth = ids = [host.queue(long(seed)) for seed in range(4)]
        ended = host.each_finished(socket, [first, second])
        post("take a prompt", id=third)
        assert [entry[1] for entry in host.get("/queue")["queue_pending"]] == [second, fourth]
        post("empty")
        assert host.get("/queue")["queue_pending"] == []
        post("stop what runs", id=first)
        assert next(ended) == first
    assert [id for id in ids if host.get(f"/history/{id}")] == [first]
    with host.events() as socket:
        last = host.queue(long(9))
        next(data for kind, data in host.told(socket) if kind == "progress" and data["prompt_id"] == last)
        post("stop whatever")
        assert list(host.each_finished(socket, [last])) == [last]
    assert host.get(f"/history/{last}")[last]["status"]["messages"][-1][0] == "execution_interrupted"
    prompt = short()
    host.run(prompt)
    post("give the memory")
    assert len(host.executed(prompt)) == len(prompt)
