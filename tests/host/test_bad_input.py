"""Every wrong input gets an error that says what was wrong, before any model runs, and the host goes on."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import TINY, Graph, RunningHost, workflow
from safetensors.torch import load_file, save_file

from mochi_core.weights.build import TINY_DIT, TINY_T5, TINY_VAE
from scripts.comfyui import PromptFailed, PromptRefused


def refusal(host: RunningHost, graph: Graph) -> str:
    with pytest.raises(PromptRefused) as refused:
        host.queue(graph.nodes)
    return json.dumps(refused.value.answer)


def failure(host: RunningHost, graph: Graph) -> str:
    """What the failing node said; the sampler must not have taken a step."""
    steps: list[Any] = []
    with pytest.raises(PromptFailed) as failed:
        host.run(graph.nodes, lambda kind, data: steps.append(data) if kind == "progress" else None)
    assert failed.value.kind == "execution_error"
    assert not steps, "no model ran"
    return failed.value.message["exception_message"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 26}, "frames is 26: it must be 6k+1"),
        ({"frames": 0}, "frames is 0: it must be 6k+1"),
        ({"frames": -5}, "frames is -5: it must be 6k+1"),
        ({"width": 100}, "width is 100: it must be a positive multiple of 16 pixels. Use 96."),
        ({"height": 0}, "height is 0: it must be a positive multiple of 16 pixels. Use 16."),
        ({"width": -64}, "width is -64: it must be a positive multiple of 16 pixels"),
        ({"seconds": -1.0}, "seconds is -1.0: it must be a length: 0 or more"),
        ({"preset": "9999x9999"}, "preset is '9999x9999': it must be one of"),
        ({"frames": 6_000_001}, "frames is 6000001: it must be from 1 to 1537"),
        ({"width": 8192}, "width is 8192: it must be from 16 to 4096"),
        ({"batch_size": 65}, "batch_size is 65: it must be from 1 to 64"),
        ({"seconds": float("nan")}, "seconds is nan: it must be a length: 0 or more"),
        ({"seconds": float("inf")}, "seconds is inf: it must be a length: 0 or more"),
    ],
)
def test_sizes_are_refused_when_queued_and_name_their_node(
    host: RunningHost, graph: Graph, options: dict[str, Any], said: str
) -> None:
    graph.probe("Latent", graph.size(**options), "size")
    answer = refusal(host, graph)
    assert said in answer and "MochiVideoSize" in answer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"linear_steps": 4}, "linear_steps is 4 of 4 steps: it must be from 1 to 3"),
        ({"threshold_noise": 1.5}, "threshold_noise is 1.5: it must be from 0.001 to 0.999"),
        ({"steps": 1}, "steps is 1: it must be from 2 to 1000"),
        ({"steps": 1_000_000}, "steps is 1000000: it must be from 2 to 1000"),
        ({"steps": 1000, "denoise": 1e-4}, "denoise is 0.0001: it must be from 0.01 to 1.0"),
        ({"denoise": float("nan")}, "denoise is nan: it must be from 0.01 to 1.0"),
        ({"denoise": 0.0}, "denoise is 0.0: it must be from 0.01 to 1.0"),
    ],
)
def test_schedules_are_refused_when_queued(host: RunningHost, graph: Graph, options: dict, said: str) -> None:
    defaults = {"preset": "custom", "steps": 4, "threshold_noise": 0.025, "linear_steps": 0, "denoise": 1.0}
    graph.probe("Sigmas", graph.add("MochiVideoSigmas", **(defaults | options)), "sigmas")
    assert said in refusal(host, graph)


def test_tile_numbers_are_refused_when_queued(host: RunningHost, graph: Graph) -> None:
    graph.probe("Image", graph.decode(graph.size(), mode="tiled spatial", tile_rows=3), "image")
    assert "tile rows is 3: it must be a power of two" in refusal(host, graph)


@pytest.mark.parametrize("fps", [float("nan"), 0.0, 1e9])
def test_a_rate_that_no_video_has_is_refused_when_queued(host: RunningHost, graph: Graph, fps: float) -> None:
    graph.probe("Image", graph.decode(graph.size(), fps=fps), "image")
    assert f"fps is {fps}: it must be from 1.0 to 240.0" in refusal(host, graph)


def test_a_strength_that_is_no_number_is_refused_before_the_file_is_opened(host: RunningHost, graph: Graph) -> None:
    file = host.models / "loras" / "any.safetensors"
    file.touch()
    lora = graph.add("MochiVideoLoraLoader", model=graph.dit(), lora_name=file.name, strength=float("nan"))
    graph.probe("Latent", graph.sampler(model=lora), "latents")
    assert "strength is nan: it must be from -20.0 to 20.0" in failure(host, graph)


def test_a_scale_that_is_no_number_is_refused_before_a_step(host: RunningHost, graph: Graph) -> None:
    graph.probe("Latent", graph.sampler(cfg=float("nan")), "latents")
    assert "cfg is nan: it must be from 0.0 to 100.0" in failure(host, graph)


@pytest.mark.parametrize("option", ["dit_name", "dtype", "attention", "memory"])
def test_null_is_no_choice(host: RunningHost, graph: Graph, option: str) -> None:
    """When it is queued it looks like a value that comes over a wire; the node looks again."""
    inputs = {"dit_name": TINY, "dtype": "auto", "attention": "auto", "memory": "auto"} | {option: None}
    graph.probe("Latent", graph.sampler(model=graph.add("MochiVideoDiTLoader", **inputs)), "latents")
    assert f"{option} is null: it must have a value" in failure(host, graph)


def test_a_wrong_number_over_a_wire_is_refused_when_it_is_known(host: RunningHost, graph: Graph) -> None:
    graph.probe("Latent", graph.size(frames=graph.add("PrimitiveInt", value=6_000_001)), "size")
    assert "frames is 6000001: it must be from 1 to 1537" in failure(host, graph)


def test_a_missing_file_is_refused_when_queued(host: RunningHost, graph: Graph) -> None:
    graph.probe("Latent", graph.sampler(model=graph.dit("not_there.safetensors")), "latents")
    answer = refusal(host, graph)
    assert "dit_name is 'not_there.safetensors': there is no such file in models/diffusion_models" in answer
    assert "MochiVideoDiTLoader" in answer


@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "int3"), ("attention", "flash9"), ("memory", "some"), ("dit_name", "../../etc/passwd")],
)
def test_unknown_choices_are_refused_when_queued(host: RunningHost, graph: Graph, option: str, value: str) -> None:
    inputs = {"dit_name": TINY, "dtype": "auto", "attention": "auto", "memory": "auto"} | {option: value}
    graph.probe("Latent", graph.sampler(model=graph.add("MochiVideoDiTLoader", **inputs)), "latents")
    assert f"{option} is '{value}'" in refusal(host, graph)


@pytest.mark.parametrize("attention", ["flash", "sage"])
def test_a_kernel_that_this_device_cannot_run_is_refused_when_loading(
    host: RunningHost, graph: Graph, attention: str
) -> None:
    if host.get("/system_stats")["devices"][0]["type"] != "cpu":
        pytest.skip("this machine has a GPU")
    graph.probe("Latent", graph.sampler(model=graph.dit(attention=attention)), "latents")
    said = failure(host, graph)
    assert f"attention is '{attention}' on cpu: {attention} needs an NVIDIA device" in said
    assert "Choose auto or sdpa" in said


def test_unknown_modes_of_sampler_and_decoder_are_refused_when_queued(host: RunningHost, graph: Graph) -> None:
    latent = graph.sampler(noise_device="tpu")
    graph.probe("Image", graph.decode(latent, mode="magic"), "image")
    answer = refusal(host, graph)
    assert "noise_device is 'tpu'" in answer and "mode is 'magic'" in answer


def test_the_full_size_workflow_names_the_files_that_are_not_there_and_has_no_other_fault(host: RunningHost) -> None:
    with pytest.raises(PromptRefused) as refused:
        host.queue(workflow("text_to_video"))
    errors = refused.value.answer["node_errors"]
    said = {node["class_type"]: node["errors"][0]["details"] for node in errors.values()}
    assert said.keys() == {"MochiVideoT5Loader", "MochiVideoDiTLoader", "MochiVideoVAELoader"}
    assert "t5xxl_fp16.safetensors" in said["MochiVideoT5Loader"]
    assert "dit.safetensors" in said["MochiVideoDiTLoader"]
    assert "decoder.safetensors" in said["MochiVideoVAELoader"]


def broken_file(path: Path, kind: str) -> Path:
    content = TINY_DIT.read_bytes()
    contents = {"empty": b"", "truncated": content[: len(content) // 2], "random": bytes(range(256)) * 64}
    path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize("kind", ["empty", "truncated", "random"])
def test_a_broken_file_is_named_and_the_good_one_still_works(host: RunningHost, graph: Graph, kind: str) -> None:
    file = broken_file(host.models / "diffusion_models" / f"{kind}.safetensors", kind)
    graph.probe("Latent", graph.sampler(model=graph.dit(file.name)), "latents")
    said = failure(host, graph)
    assert str(file) in said and "a weight file must be a whole safetensors file" in said and "download it" in said

    good = Graph()
    good.probe("Latent", good.sampler(), "latents")
    assert torch.isfinite(host.tensors(good, "latents")["samples"]).all()


def test_files_of_another_model_say_what_they_hold(host: RunningHost) -> None:
    folders = {"diffusion_models": TINY_VAE, "text_encoders": TINY_DIT, "vae": TINY_T5}
    for folder, source in folders.items():
        (host.models / folder / "wrong.safetensors").write_bytes(source.read_bytes())

    def said(load: str) -> str:
        graph = Graph()
        link = getattr(graph, load)("wrong.safetensors")
        if load == "dit":
            graph.probe("Latent", graph.sampler(model=link), "out")
        elif load == "t5":
            graph.probe("Conditioning", graph.text(link, "x"), "out")
        else:
            graph.probe("Image", graph.decode(graph.size(), vae=link), "out")
        return failure(host, graph)

    assert "is not a Mochi DiT: it holds a Mochi VAE decoder and a Mochi VAE encoder" in said("dit")
    assert "is not a T5 text encoder: it holds a Mochi DiT" in said("t5")
    assert "is not a Mochi VAE decoder: it holds a T5 text encoder" in said("vae")


def test_a_file_with_tensors_missing_names_them(host: RunningHost, graph: Graph) -> None:
    tensors = load_file(TINY_DIT)
    del tensors["blocks.2.mlp_x.w1.weight"]
    tensors["blocks.2.surprise"] = torch.zeros(1)
    tensors["final_layer.linear.bias"] = torch.zeros(7)
    from mochi_core.weights.checkpoint import Checkpoint

    save_file(tensors, host.models / "diffusion_models" / "half.safetensors", dict(Checkpoint(TINY_DIT).metadata))
    graph.probe("Latent", graph.sampler(model=graph.dit("half.safetensors")), "latents")
    said = failure(host, graph)
    assert "1 missing (blocks.2.mlp_x.w1.weight)" in said
    assert "1 unknown (blocks.2.surprise)" in said
    assert "final_layer.linear.bias (7,) instead of (48,)" in said


@pytest.mark.parametrize("width", [768, 4096])
def test_conditioning_of_another_model_is_refused_by_ours_and_by_native_sampling(host: RunningHost, width: int) -> None:
    for native in (False, True):
        graph = Graph()
        foreign = graph.add("MochiTestForeignConditioning", width=width)
        shared = {"model": graph.dit(), "positive": foreign, "negative": foreign, "seed": 0, "steps": 4, "cfg": 4.0}
        if native:
            options = {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
            out = graph.add("KSampler", **shared, **options, latent_image=graph.size())
        else:
            out = graph.add("MochiVideoSampler", **shared, latent=graph.size(), noise_device="cpu")
        graph.probe("Latent", out, "latents")
        said = failure(host, graph)
        assert f"text features of width {width}: this DiT reads T5 features of width 64" in said


def test_nan_latents_are_refused_by_sampler_and_decoder(host: RunningHost) -> None:
    graph = Graph()
    graph.probe("Latent", graph.sampler(graph.add("MochiTestWrongLatent", channels=12)), "latents")
    assert "The latents to start from: 1536 of 1536 values are NaN or infinite" in failure(host, graph)
    graph = Graph()
    graph.probe("Image", graph.decode(graph.add("MochiTestWrongLatent", channels=12)), "image")
    assert "The latents to decode: 1536 of 1536 values are NaN or infinite" in failure(host, graph)


def test_a_schedule_that_rises_is_refused(host: RunningHost, graph: Graph) -> None:
    options = {"preset": "custom", "threshold_noise": 0.025, "linear_steps": 0, "denoise": 1.0}
    flipped = graph.add("FlipSigmas", sigmas=graph.add("MochiVideoSigmas", steps=4, **options))
    graph.probe("Latent", graph.sampler(sigmas=flipped), "latents")
    assert "noise levels must fall at every step" in failure(host, graph)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("6*2, 4*1", "The CFG schedule covers 3 steps: the noise schedule has 4"),
        ("six", "cfg_schedule has 'six'"),
    ],
)
def test_a_cfg_schedule_that_does_not_fit_is_refused(host: RunningHost, graph: Graph, text: str, said: str) -> None:
    graph.probe("Latent", graph.sampler(cfg_schedule=text), "latents")
    assert said in failure(host, graph)


def test_gpu_noise_without_a_gpu_says_what_to_choose(host: RunningHost, graph: Graph) -> None:
    if host.get("/system_stats")["devices"][0]["type"] != "cpu":
        pytest.skip("this machine has a GPU")
    graph.probe("Latent", graph.sampler(noise_device="gpu, as the reference"), "latents")
    assert "this host has no GPU" in failure(host, graph)


def test_a_vae_without_an_encoder_says_which_file_to_get(host: RunningHost, graph: Graph) -> None:
    from mochi_core.weights.checkpoint import Checkpoint

    checkpoint = Checkpoint(TINY_VAE)
    decoder = {name: checkpoint.tensor(name) for name in checkpoint.names if name.startswith("decoder.")}
    save_file(decoder, host.models / "vae" / "decoder_only.safetensors", dict(checkpoint.metadata))
    clip = graph.add("MochiTestMoving", frames=7, height=64, width=64)
    vae = graph.vae("decoder_only.safetensors")
    graph.probe("Latent", graph.add("MochiVideoEncode", vae=vae, image=clip, sample_posterior=False, seed=0), "out")
    assert "has no encoder: encoding needs one. Load encoder.safetensors, or the combined VAE" in failure(host, graph)


def test_prompts_of_no_word_and_of_5000_words_run_and_the_cut_is_said(host: RunningHost, graph: Graph) -> None:
    long = " ".join(f"word{index}" for index in range(5000))
    for name, text in (("none", ""), ("long", long)):
        positive, negative = graph.prompts(text)
        graph.probe("Latent", graph.sampler(positive=positive, negative=negative, steps=2), name)
    for latents in host.tensors(graph, "none", "long"):
        assert torch.isfinite(latents["samples"]).all()
    assert "The prompt is longer than 256 tokens; the model will not see its last" in host.log_text()
    assert "word4999" in host.log_text()


def test_an_interrupted_run_leaves_the_host_usable(host: RunningHost, graph: Graph) -> None:
    graph.probe("Latent", graph.sampler(graph.size(frames=61), steps=400, seed=77), "latents")
    started = threading.Event()

    def interrupt() -> None:
        started.wait(60)
        host.post("/interrupt", {})

    threading.Thread(target=interrupt, daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(PromptFailed) as failed:
        host.run(graph.nodes, lambda kind, data: started.set() if kind == "progress" else None)
    assert failed.value.kind == "execution_interrupted"
    assert time.monotonic() - begun < 60

    again = Graph()
    again.probe("Latent", again.sampler(), "latents")
    assert torch.isfinite(host.tensors(again, "latents")["samples"]).all()


def test_the_tiny_checkpoint_is_offered_first_by_each_loader(host: RunningHost) -> None:
    info = host.get("/object_info")
    for node, name in (
        ("MochiVideoT5Loader", "t5_name"),
        ("MochiVideoDiTLoader", "dit_name"),
        ("MochiVideoVAELoader", "vae_name"),
    ):
        kind, options = info[node]["input"]["required"][name]
        assert (options["options"] if kind == "COMBO" else kind)[0] == TINY
