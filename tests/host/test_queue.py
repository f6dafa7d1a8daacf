"""A queue of prompts: stopped at once, emptied, fifty in a row, in any order. The host stays as it was."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
import torch
from harness import Graph, RunningHost
from safetensors.torch import load_file

from scripts.comfyui import PromptFailed

MIB = 2**20


@dataclass
class Interrupted:
    """A run that was interrupted in the middle of a unit of work, such as a step of the sampler."""

    unit: float  # seconds that a unit takes
    further: int  # units that were still finished after the request
    waited: float  # seconds from the request to the end


def interrupted(host: RunningHost, graph: Graph, worker: str, after: int) -> Interrupted:
    """Runs the graph; half a unit after the node of kind `worker` has reported `after` units of work, interrupts it."""
    reports: list[float] = []
    asked: list[float] = []

    def ask() -> None:
        asked.append(time.monotonic())
        host.post("/interrupt", {})

    def unit() -> float:
        return median(later - earlier for earlier, later in pairwise(reports[:after]))

    def watch(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and graph.nodes[data["node"]]["class_type"] == worker:
            reports.append(time.monotonic())
            if len(reports) == after:
                threading.Timer(unit() / 2, ask).start()

    with pytest.raises(PromptFailed) as failed:
        host.run(graph.nodes, watch)
    ended = time.monotonic()
    assert failed.value.kind == "execution_interrupted"
    assert graph.nodes[failed.value.message["node_id"]]["class_type"] == worker
    return Interrupted(unit(), sum(report > asked[0] for report in reports), ended - asked[0])


def long_sampling(seed: int = 77) -> Graph:
    graph = Graph()
    size = graph.size(frames=61, width=192, height=192)
    graph.probe("Latent", graph.sampler(size, steps=200, seed=seed), "long")
    return graph


def long_decode() -> Graph:
    graph = Graph()
    graph.probe("Image", graph.decode(graph.size(frames=331, width=192, height=192)), "long")
    return graph


def short_run() -> Graph:
    graph = Graph()
    graph.probe("Image", graph.decode(graph.sampler(graph.size(frames=7), steps=2)), "short")
    return graph


@pytest.mark.parametrize(
    ("long", "worker", "after"),
    [(long_sampling, "MochiVideoSampler", 3), (long_decode, "MochiVideoDecode", 20)],
    ids=["sampling", "decoding"],
)
def test_an_interruption_ends_the_unit_of_work_and_gives_its_memory_back(
    host: RunningHost, long: Callable[[], Graph], worker: str, after: int
) -> None:
    runs, memory = [], []
    for _ in range(6):
        runs.append(interrupted(host, long(), worker, after))
        frames = host.tensors(short_run(), "short")["image"]
        assert frames.shape == (7, 64, 64, 3) and torch.isfinite(frames).all(), "the next prompt runs"
        memory.append(host.memory)
    assert all(run.further <= 1 for run in runs), "a unit may end while the request is on its way"
    waited, unit = median(run.waited for run in runs), median(run.unit for run in runs)
    assert waited < unit + 0.1, f"{waited:.2f} s where a unit takes {unit:.2f} s"
    # Kept frames of five interrupted decodes would be 265 MB. The allocator itself comes and goes by about 100.
    assert memory[-1] - memory[0] < 160e6, [round(bytes / MIB) for bytes in memory]


def test_a_deleted_prompt_never_starts(host: RunningHost) -> None:
    (host.output / "deleted.safetensors").unlink(missing_ok=True)
    doomed = Graph()
    doomed.probe("Latent", doomed.sampler(steps=2, seed=5), "deleted")
    kept = Graph()
    kept.probe("Latent", kept.sampler(steps=2, seed=6), "kept")
    with host.events() as socket:
        running = host.queue(long_sampling().nodes)
        deleted, after = host.queue(doomed.nodes), host.queue(kept.nodes)
        for kind, data in host.told(socket):
            if kind == "progress" and data["prompt_id"] == running:
                break
        assert [entry[1] for entry in host.get("/queue")["queue_pending"]] == [deleted, after]
        host.post("/queue", {"delete": [deleted]})
        assert [entry[1] for entry in host.get("/queue")["queue_pending"]] == [after]
        host.post("/interrupt", {"prompt_id": deleted})  # not the one that runs: nothing happens
        host.post("/interrupt", {"prompt_id": running})
        started = []
        for kind, data in host.told(socket):
            started += [data["prompt_id"]] if kind == "execution_start" else []
            if kind == "executing" and data["node"] is None and data["prompt_id"] == after:
                break
    assert started == [after]
    assert host.get(f"/history/{deleted}") == {}
    assert host.get(f"/history/{after}")[after]["status"]["status_str"] == "success"
    assert not (host.output / "deleted.safetensors").exists()


def test_interrupting_a_prompt_that_only_waits_leaves_the_running_one_alone(host: RunningHost) -> None:
    first, second = Graph(), Graph()
    first.probe("Latent", first.sampler(steps=60, seed=8), "first")
    second.probe("Latent", second.sampler(steps=2, seed=9), "second")
    with host.events() as socket:
        ids = [host.queue(first.nodes), host.queue(second.nodes)]
        host.post("/interrupt", {"prompt_id": ids[1]})
        assert list(host.each_finished(socket, ids)) == ids
    assert [host.get(f"/history/{id}")[id]["status"]["status_str"] for id in ids] == ["success", "success"]


def test_fifty_queued_prompts_all_succeed_and_memory_stays_flat(host: RunningHost) -> None:
    def prompt(seed: int) -> dict:
        graph = Graph()
        graph.probe("Image", graph.decode(graph.sampler(graph.size(frames=7), steps=2, seed=seed)), f"fifty_{seed}")
        return graph.nodes

    memory = []
    with host.events() as socket:
        ids = [host.queue(prompt(seed)) for seed in range(50)]
        finished = []
        for prompt_id in host.each_finished(socket, ids):
            finished.append(prompt_id)
            memory.append(host.memory)
    assert finished == ids, "in the order of the queue"
    assert {host.get(f"/history/{id}")[id]["status"]["status_str"] for id in ids} == {"success"}
    frames = [load_file(host.output / f"fifty_{seed}.safetensors")["image"] for seed in range(50)]
    assert all(not torch.equal(one, other) for one, other in pairwise(frames)), "each seed its own video"
    tenth, fiftieth = memory[9], memory[49]
    assert fiftieth < 1.03 * tenth, f"{tenth / MIB:.0f} MiB after the tenth, {fiftieth / MIB:.0f} after the fiftieth"


def test_a_seed_gives_the_same_latents_in_any_order_and_beside_any_others(host: RunningHost) -> None:
    seeds = list(range(100, 108))

    def latents_of(order: Sequence[int], name: str, **between: int) -> dict[int, torch.Tensor]:
        """The latents of each seed, run in this order, each followed by a prompt of another size."""
        graphs = []
        for seed in order:
            graph, other = Graph(), Graph()
            graph.probe("Latent", graph.sampler(steps=3, seed=seed), f"{name}_{seed}")
            other.probe("Latent", other.sampler(other.size(**between), steps=2, seed=seed + 1), "between")
            graphs += [graph, other]
        with host.events() as socket:
            ids = [host.queue(graph.nodes) for graph in graphs]
            assert list(host.each_finished(socket, ids)) == ids
        return {seed: load_file(host.output / f"{name}_{seed}.safetensors")["samples"] for seed in seeds}

    shuffled = random.Random(5).sample(seeds, len(seeds))
    first = latents_of(seeds, "in_order", frames=7)
    second = latents_of(shuffled, "shuffled", frames=19, width=96, batch_size=2)
    assert shuffled != seeds
    assert all(torch.equal(first[seed], second[seed]) for seed in seeds)
    assert not any(torch.equal(first[seed], first[seed + 1]) for seed in seeds[:-1])


def test_prompts_run_while_the_page_asks_for_the_nodes(host: RunningHost) -> None:
    """The host lists files in the thread of the server and in that of the queue, at the same time."""
    graphs = []
    for seed in range(30):
        graph = Graph()
        graph.probe("Latent", graph.sampler(graph.size(frames=7), steps=2, seed=seed), "asked")
        graphs.append(graph)
    with host.events() as socket:
        ids = [host.queue(graph.nodes) for graph in graphs]
        ended = host.each_finished(socket, ids)
        for _ in ids:
            for _ in range(5):
                assert host.get("/object_info/MochiVideoDiTLoader")["MochiVideoDiTLoader"]
            assert next(ended)
    assert {host.get(f"/history/{id}")[id]["status"]["status_str"] for id in ids} == {"success"}
