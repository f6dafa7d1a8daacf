"""Our MODEL, CLIP and VAE under the host's own nodes give what our nodes give."""

import torch
from harness import PROMPT, Graph, RunningHost

STEPS = 6


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], name: str) -> float:
    assert a[name].shape == b[name].shape
    return (a[name] - b[name]).abs().max().item()


def native_text(graph: Graph, clip: list, text: str) -> list:
    return graph.add("CLIPTextEncode", clip=clip, text=text)


def test_native_ksampler_on_our_model_equals_our_sampler(host: RunningHost, graph: Graph) -> None:
    model, (positive, negative), latent = graph.dit(), graph.prompts(), graph.size()
    shared = {"model": model, "positive": positive, "negative": negative, "seed": 5, "steps": STEPS, "cfg": 4.0}
    ours = graph.add("MochiVideoSampler", **shared, latent=latent, noise_device="cpu")
    native = graph.add(
        "KSampler", **shared, latent_image=latent, sampler_name="euler", scheduler="linear_quadratic", denoise=1.0
    )
    graph.probe("Latent", ours, "ours")
    graph.probe("Latent", native, "native")
    assert difference(*host.tensors(graph, "ours", "native"), "samples") <= 1e-5


def custom_sampling(graph: Graph, guider: list, sigmas: list, latent: list) -> list:
    noise = graph.add("RandomNoise", noise_seed=5)
    sampler = graph.add("KSamplerSelect", sampler_name="euler")
    return graph.add(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )


def released_sigmas(graph: Graph, **options: object) -> list:
    defaults = {"preset": "Mochi 1 (released)", "threshold_noise": 0.025, "linear_steps": 0, "denoise": 1.0}
    return graph.add("MochiVideoSigmas", steps=STEPS, **(defaults | options))


def test_sampler_custom_advanced_with_our_guider_and_sigmas_equals_our_sampler(host: RunningHost, graph: Graph) -> None:
    model, (positive, negative), latent = graph.dit(), graph.prompts(), graph.size()
    shared = {"model": model, "positive": positive, "negative": negative}
    graph.probe("Latent", graph.sampler(latent, **shared, seed=5, steps=STEPS), "ours")
    for name, options in {
        "batched": {"cfg": 4.0, "cfg_schedule": "", "batch_cfg": True},
        "sequential": {"cfg": 4.0, "cfg_schedule": "", "batch_cfg": False},
        "scheduled": {"cfg": 99.0, "cfg_schedule": "4*4, 4.0*2", "batch_cfg": False},
        "another": {"cfg": 4.0, "cfg_schedule": "8*3, 1*3", "batch_cfg": True},
    }.items():
        guider = graph.add("MochiVideoGuider", **shared, **options)
        graph.probe("Latent", custom_sampling(graph, guider, released_sigmas(graph), latent), name)
    ours, batched, sequential, scheduled, another = host.tensors(
        graph, "ours", "batched", "sequential", "scheduled", "another"
    )
    assert difference(ours, batched, "samples") <= 1e-5
    assert difference(ours, sequential, "samples") <= 5e-5  # one prompt a forward rounds apart from two
    assert difference(sequential, scheduled, "samples") == 0
    assert difference(ours, another, "samples") > 0.1


def test_our_sampler_takes_sigmas_and_a_schedule_and_says_so(host: RunningHost, graph: Graph) -> None:
    latent, sigmas = graph.size(), released_sigmas(graph, preset="FastMochi (8 steps)")
    graph.probe("Latent", graph.sampler(latent, steps=50, sigmas=sigmas, cfg_schedule="4*6"), "given")
    graph.probe("Sigmas", sigmas, "sigmas")
    given, levels = host.tensors(graph, "given", "sigmas")
    assert torch.isfinite(given["samples"]).all()
    assert len(levels["sigmas"]) == STEPS + 1 and levels["sigmas"][0] == 1 and levels["sigmas"][-1] == 0
    assert "sigmas replace steps: 6 steps instead of 50" in host.log_text()
    assert "cfg_schedule replaces cfg: 4*6" in host.log_text()


def test_denoise_takes_the_last_part_of_a_longer_schedule(host: RunningHost, graph: Graph) -> None:
    graph.probe("Sigmas", released_sigmas(graph, denoise=0.5), "half")
    levels = host.tensors(graph, "half")["sigmas"]
    assert len(levels) == STEPS + 1 and levels[0] < 1 and levels[-1] == 0


def test_video_to_video_starts_from_a_clip(host: RunningHost, graph: Graph) -> None:
    vae = graph.vae()
    clip = graph.add("MochiTestMoving", frames=13, height=64, width=64)
    latent = graph.add("MochiVideoEncode", vae=vae, image=clip, sample_posterior=False, seed=0)
    graph.probe("Latent", latent, "start")
    graph.probe("Latent", graph.sampler(latent, sigmas=released_sigmas(graph, denoise=0.1)), "near")
    graph.probe("Latent", graph.sampler(latent, sigmas=released_sigmas(graph)), "far")
    start, near, far = (tensors["samples"] for tensors in host.tensors(graph, "start", "near", "far"))
    assert (near - start).square().mean() < 0.5 * (far - start).square().mean()


def test_native_decode_and_encode_on_our_vae_equal_ours(host: RunningHost, graph: Graph) -> None:
    vae, latent = graph.vae(), graph.sampler()
    ours = graph.decode(latent, vae=vae)
    graph.probe("Image", ours, "ours")
    graph.probe("Image", graph.add("VAEDecode", vae=vae, samples=latent), "native")
    graph.probe("Image", graph.decode(latent, vae=vae, mode="full"), "full")
    graph.probe("Latent", graph.add("MochiVideoEncode", vae=vae, image=ours, sample_posterior=False, seed=0), "encoded")
    graph.probe("Latent", graph.add("VAEEncode", vae=vae, pixels=ours), "native_encoded")
    frames, native, full, encoded, native_encoded = host.tensors(
        graph, "ours", "native", "full", "encoded", "native_encoded"
    )
    assert difference(frames, native, "image") == 0
    assert difference(frames, full, "image") <= 2e-6
    assert difference(encoded, native_encoded, "samples") == 0


def test_tiled_decode_keeps_every_frame(host: RunningHost, graph: Graph) -> None:
    vae, latent = graph.vae(), graph.sampler()
    tiles = {"tile_rows": 2, "tile_columns": 2, "tile_overlap": 4}
    graph.probe("Image", graph.decode(latent, vae=vae, mode="full"), "full")
    graph.probe("Image", graph.decode(latent, vae=vae, mode="tiled spatial", **tiles), "tiled")
    full, tiled = host.tensors(graph, "full", "tiled")
    assert full["image"].shape == tiled["image"].shape == (13, 64, 64, 3)
    assert difference(full, tiled, "image") > 0
    assert (full["image"] - tiled["image"]).abs().mean() < 0.1


def test_encode_crops_to_the_grid_says_so_and_can_draw_from_the_posterior(host: RunningHost, graph: Graph) -> None:
    vae = graph.vae()
    clip = graph.add("MochiTestMoving", frames=16, height=70, width=83)
    for name, draw, seed in (("mean", False, 0), ("one", True, 1), ("again", True, 1), ("other", True, 2)):
        latent = graph.add("MochiVideoEncode", vae=vae, image=clip, sample_posterior=draw, seed=seed)
        graph.probe("Latent", latent, name)
    mean, one, again, other = host.tensors(graph, "mean", "one", "again", "other")
    assert mean["samples"].shape == (1, 12, 3, 8, 10)
    assert "encoding 80x64, 13 frames of 83x70, 16 frames" in host.log_text()
    assert difference(one, again, "samples") == 0
    assert difference(one, other, "samples") > 0 and difference(one, mean, "samples") > 0


def test_native_text_encode_on_our_clip_equals_ours_without_weight_syntax(host: RunningHost, graph: Graph) -> None:
    clip = graph.t5()
    texts = {"plain": PROMPT, "empty": "", "long": "red circle " * 2500, "lines": "a red\ncircle, moving; right!"}
    for name, text in texts.items():
        graph.probe("Conditioning", graph.text(clip, text), f"ours_{name}")
        graph.probe("Conditioning", native_text(graph, clip, text), f"native_{name}")
    found = host.tensors(graph, *(f"{kind}_{name}" for name in texts for kind in ("ours", "native")))
    for ours, native in zip(found[::2], found[1::2]):
        assert torch.equal(ours["features"], native["features"]) and torch.equal(ours["mask"], native["mask"])
        assert ours["features"].shape == (1, 256, 64) and ours["mask"].dtype == torch.int64


def test_weight_syntax_is_text_to_us_and_weight_to_the_host(host: RunningHost, graph: Graph) -> None:
    clip, text = graph.t5(), "a (red:1.5) circle"
    graph.probe("Conditioning", graph.text(clip, text), "literal")
    graph.probe("Conditioning", graph.text(clip, text, weighting=True), "weighted")
    graph.probe("Conditioning", native_text(graph, clip, text), "native")
    literal, weighted, native = host.tensors(graph, "literal", "weighted", "native")
    assert torch.equal(weighted["features"], native["features"])
    assert literal["mask"].sum() > weighted["mask"].sum()


def test_native_size_node_and_native_model_caching_wrapper_work(host: RunningHost, graph: Graph) -> None:
    latent = graph.add("EmptyMochiLatentVideo", width=64, height=64, length=13, batch_size=1)
    model = graph.dit()
    lazy = graph.add("EasyCache", model=model, reuse_threshold=0.5, start_percent=0.15, end_percent=0.95, verbose=False)
    graph.probe("Latent", graph.sampler(latent, model=model, steps=10), "plain")
    graph.probe("Latent", graph.sampler(latent, model=lazy, steps=10), "cached")
    plain, cached = host.tensors(graph, "plain", "cached")
    # A cache that skips forwards changes the numbers: on native Mochi it is inert.
    assert difference(plain, cached, "samples") > 0
