"""A prompt becomes a video in the real host, and the same one every time."""

import av
import torch
from harness import Graph, RunningHost, workflow

from mochi_core.pipeline import MochiPipeline, TextToVideo
from mochi_core.sampling.schedule import linear_quadratic
from mochi_core.shapes import VideoSize


def test_the_tiny_workflow_saves_a_video_of_the_right_size_that_shows_the_prompt(host: RunningHost) -> None:
    seen: set[str] = set()
    outputs = host.run(workflow("text_to_video_tiny"), lambda kind, data: seen.add(kind))
    (path,) = host.saved(outputs)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 30
        frames = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(stream)])
        assert "prompt" in container.metadata
    assert frames.shape == (19, 64, 64, 3)
    assert "progress" in seen
    red = (frames[..., 0] > 128) & (frames[..., 1] < 100)
    black = frames.amax(-1) < 60
    assert red[0].float().mean() > 0.05 and black[0].float().mean() > 0.5
    columns = torch.arange(64.0)
    middle = [(red[index].float().sum(0) * columns).sum() / red[index].sum() for index in (0, 9, 18)]
    assert middle[0] < middle[1] - 3 < middle[2] - 6, "the circle moves right"


def test_same_prompt_and_seed_give_identical_frames_after_a_restart(host: RunningHost, graph: Graph) -> None:
    graph.probe("Image", graph.decode(graph.sampler()), "frames")
    first = host.tensors(graph, "frames")["image"]
    host.restart()
    second = host.tensors(graph, "frames")["image"]
    assert first.shape == (13, 64, 64, 3)
    assert torch.equal(first, second)


def test_another_seed_gives_another_video(host: RunningHost, graph: Graph) -> None:
    graph.probe("Latent", graph.sampler(seed=3), "one")
    graph.probe("Latent", graph.sampler(seed=4), "other")
    one, other = host.tensors(graph, "one", "other")
    assert not torch.allclose(one["samples"], other["samples"])


def test_our_sampler_and_the_pipeline_give_the_same_latents(host: RunningHost, graph: Graph) -> None:
    graph.probe("Latent", graph.sampler(steps=8), "latents")
    request = TextToVideo(
        "a red circle moving right on a black background",
        size=VideoSize(64, 64, 13),
        schedule=linear_quadratic(8),
        cfg=4.0,
        seed=3,
        batched_cfg=True,  # as the host does it
    )
    expected = MochiPipeline.tiny().sample(request)
    assert (host.tensors(graph, "latents")["samples"] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_batch_of_two_holds_the_single_video_first(host: RunningHost, graph: Graph) -> None:
    graph.probe("Latent", graph.sampler(graph.size(batch_size=1)), "single")
    graph.probe("Latent", graph.sampler(graph.size(batch_size=2)), "pair")
    single, pair = host.tensors(graph, "single", "pair")
    assert pair["samples"].shape[0] == 2
    # Noise is drawn for the whole batch, and its first part is the single video's.
    assert (pair["samples"][:1] - single["samples"]).abs().max() <= 5e-5  # a batch of four forwards rounds apart
