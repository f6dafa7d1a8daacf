"""Hostile names and malformed prompts, as a script might post them: refused with node and value, nothing opened."""

import copy
import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Graph, RunningHost, workflow
from safetensors.torch import load_file, save_file

from mochi_core.weights.build import TINY_DIT, TINY_T5, TINY_VAE
from scripts.comfyui import PromptFailed

LOADERS = {
    "MochiVideoT5Loader": ("1", "t5_name", "text_encoders"),
    "MochiVideoDiTLoader": ("2", "dit_name", "diffusion_models"),
    "MochiVideoVAELoader": ("3", "vae_name", "vae"),
}
SECRET = "secret.safetensors"
ENDLESS = "a" * 5000


def with_inputs(node: str, **inputs: Any) -> dict[str, Any]:
    prompt = workflow("text_to_video_tiny")
    prompt[node]["inputs"].update(inputs)
    return prompt


@pytest.fixture(scope="session")
def secrets(host: RunningHost) -> Path:
    """A folder beside the models folder with good weight files, which no name may reach."""
    folder = host.base / "secrets"
    (folder / "inner").mkdir(parents=True)
    for source in (TINY_DIT, TINY_T5, TINY_VAE):
        (folder / source.name).write_bytes(source.read_bytes())
    for name in (SECRET, "inner/model.safetensors"):
        (folder / name).write_bytes(TINY_DIT.read_bytes())
    (folder / "inner" / "config.json").write_text("{}")
    return folder


@contextmanager
def opened(folder: Path) -> Iterator[list[str]]:
    """The names of the files in `folder` that any process opens in the block; Linux tells."""
    if not hasattr(os, "eventfd"):
        pytest.skip("needs Linux's inotify, and Python 3.10")
    libc = ctypes.CDLL(None, use_errno=True)
    watcher = libc.inotify_init1(os.O_NONBLOCK)
    in_open = 0x20
    assert watcher >= 0 and libc.inotify_add_watch(watcher, os.fsencode(folder), in_open) >= 0
    names: list[str] = []
    try:
        yield names
        try:
            content = os.read(watcher, 2**16)
        except BlockingIOError:
            content = b""
        while content:
            (length,) = struct.unpack_from("I", content, 12)
            names.append(os.fsdecode(content[16 : 16 + length].rstrip(b"\0")))
            content = content[16 + length :]
    finally:
        os.close(watcher)


def hostile(host: RunningHost, folder: str) -> dict[str, str]:
    """Names that point, or pretend to point, at the secret file from one of the host's model folders."""
    secret = host.base / "secrets" / SECRET
    return {
        "up": f"../../secrets/{SECRET}",
        "up from a folder": f"{folder}/../../../secrets/{SECRET}",
        "absolute": str(secret),
        "a folder, up": "../../secrets/inner/",
        "a folder, absolute": f"{secret.parent}/inner/",
        "windows": f"..\\..\\secrets\\{SECRET}",
        "windows, absolute": f"C:\\secrets\\{SECRET}",
        "nul": f"{SECRET}\0.safetensors",
        "nul after the tiny name": "mochi-video-tiny\0",
        "endless": ENDLESS,
        "endless folder": f"{ENDLESS}/",
        "url": f"file://{secret}",
        "empty": "",
        "dot": "./",
        "home": f"~/{SECRET}",
    }


def said(name: str) -> str:
    """How an error quotes a name; of an endless one only the beginning."""
    return repr(name) if len(repr(name)) <= 300 else f"{repr(name)[:300]}..."


def test_watching_a_folder_sees_what_is_opened_in_it(secrets: Path) -> None:
    with opened(secrets) as names:
        (secrets / SECRET).read_bytes()
    assert SECRET in names


@pytest.mark.parametrize("loader", LOADERS)
def test_a_hostile_file_name_is_refused_by_its_node_and_opens_nothing(
    host: RunningHost, secrets: Path, loader: str
) -> None:
    node, option, folder = LOADERS[loader]
    with opened(secrets) as names:
        for kind, name in hostile(host, folder).items():
            status, answer = host.answer({"prompt": with_inputs(node, **{option: name})})
            assert status == 400, kind
            assert answer["node_errors"].keys() == {node}, kind
            error = answer["node_errors"][node]
            assert error["class_type"] == loader
            assert (
                f"{option} is {said(name)}: there is no such file in models/{folder}" in error["errors"][0]["details"]
            )
    assert not names


def test_a_hostile_tokenizer_is_refused_the_same_way(host: RunningHost, secrets: Path) -> None:
    with opened(secrets) as names:
        for kind, name in hostile(host, "text_encoders").items():
            status, answer = host.answer({"prompt": with_inputs("1", tokenizer=name)})
            assert status == 400, kind
            assert (
                f"tokenizer is {said(name)}: it must be one of auto, "
                in answer["node_errors"]["1"]["errors"][0]["details"]
            )
    assert not names


def test_a_hostile_lora_is_refused_the_same_way(host: RunningHost, secrets: Path) -> None:
    graph = Graph()
    lora = graph.add("MochiVideoLoraLoader", model=graph.dit(), lora_name="", strength=1.0)
    graph.probe("Latent", graph.sampler(model=lora), "latents")
    with opened(secrets) as names:
        for kind, name in hostile(host, "loras").items():
            graph.nodes[lora[0]]["inputs"]["lora_name"] = name
            status, answer = host.answer({"prompt": graph.nodes})
            assert status == 400, kind
            details = [error["details"] for error in answer["node_errors"][lora[0]]["errors"]]
            assert any(
                f"lora_name is {said(name)}: there is no such file in models/loras" in each for each in details
            ), kind
    assert not names


def test_beside_a_good_output_a_hostile_name_still_opens_nothing(host: RunningHost, secrets: Path) -> None:
    """The host then takes the prompt, runs the good part, and asks every node what its files are like."""
    graph = Graph()
    graph.probe("Latent", graph.size(), "good")
    loader = graph.dit("")
    graph.probe("Latent", graph.sampler(model=loader, steps=2), "bad")
    with opened(secrets) as names, host.events() as socket:
        for kind, name in hostile(host, "diffusion_models").items():
            graph.nodes[loader[0]]["inputs"]["dit_name"] = name
            for file in ("good", "bad"):
                (host.output / f"{file}.safetensors").unlink(missing_ok=True)
            status, answer = host.answer({"prompt": graph.nodes, "client_id": host.client})
            assert status == 200, kind
            assert answer["node_errors"].keys() == {loader[0]}, kind
            assert list(host.each_finished(socket, [answer["prompt_id"]])) == [answer["prompt_id"]], kind
            assert (host.output / "good.safetensors").exists(), kind
            assert not (host.output / "bad.safetensors").exists(), kind
    assert not names


# What the host's own nodes do with names


def saving(kind: str, prefix: str) -> Graph:
    graph = Graph()
    if kind == "SaveVideo":
        video = Graph.out(graph.decode(graph.size(frames=7)), 1)
        graph.add(kind, video=video, filename_prefix=prefix, format="mp4", codec="h264")
    else:
        graph.add(kind, samples=graph.size(frames=7), filename_prefix=prefix)
    return graph


def escaped(host: RunningHost) -> list[Path]:
    """Files called so anywhere around the host's output folder, but not in it."""
    around = [path for folder in (*host.base.parents, Path("/tmp")) for path in folder.glob("*escaped*")]
    within = [path for path in host.base.rglob("*escaped*") if not path.is_relative_to(host.output)]
    return around + within


@pytest.mark.parametrize("kind", ["SaveVideo", "SaveLatent"])
@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("../escaped", "outside the output folder is not allowed"),
        ("../../../../../../tmp/escaped", "outside the output folder is not allowed"),
        ("video/../../escaped", "outside the output folder is not allowed"),
        ("{base}/escaped", "outside the output folder is not allowed"),
        ("../nul\0escaped", "outside the output folder is not allowed"),
        (ENDLESS, "File name too long"),
    ],
    ids=["up", "far up", "up from a folder", "absolute", "nul", "endless"],
)
def test_a_saving_node_refuses_to_write_outside_the_output_folder(
    host: RunningHost, kind: str, prefix: str, said: str
) -> None:
    with pytest.raises(PromptFailed) as failed:
        host.run(saving(kind, prefix.format(base=host.base)).nodes)
    assert failed.value.message["node_type"] == kind
    assert said in failed.value.message["exception_message"]
    assert not escaped(host)


@pytest.mark.skipif(os.name == "nt", reason="there a backslash parts folders")
@pytest.mark.parametrize("kind", ["SaveVideo", "SaveLatent"])
def test_backslashes_stay_part_of_a_name_in_the_output_folder(host: RunningHost, kind: str) -> None:
    (saved,) = host.saved(host.run(saving(kind, "..\\..\\escaped").nodes))
    assert saved.is_file() and saved.parent == host.output and saved.name.startswith("..\\..\\escaped_")
    assert not escaped(host)


@pytest.mark.parametrize("name", ["nothing.latent", "../nothing.latent", "nul\0.latent", ENDLESS], ids=repr)
def test_the_latents_of_a_file_that_is_not_there_are_refused_when_queued(host: RunningHost, name: str) -> None:
    graph = Graph()
    graph.probe("Latent", graph.add("LoadLatent", latent=name), "loaded")
    status, answer = host.answer({"prompt": graph.nodes})
    assert status == 400
    assert f"Invalid latent file: {name}" in answer["node_errors"]["1"]["errors"][0]["details"]


def test_the_hosts_load_latent_reads_latents_that_lie_elsewhere_and_nothing_but_latents(host: RunningHost) -> None:
    """It asks only whether the file is there. Whoever opens a host to others should know; this pack has no such way."""
    elsewhere = host.base / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    latents = {"latent_tensor": torch.ones(1, 12, 2, 8, 8), "latent_format_version_0": torch.tensor([])}
    save_file(latents, elsewhere / "out.latent")
    (elsewhere / "text.latent").write_text("a secret line of text, long enough to be a header")
    save_file({"other": torch.ones(3)}, elsewhere / "weights.latent")

    def load(file: str) -> Graph:
        graph = Graph()
        graph.probe("Latent", graph.add("LoadLatent", latent=f"../elsewhere/{file}"), "loaded")
        return graph

    assert torch.equal(host.tensors(load("out.latent"), "loaded")["samples"], torch.ones(1, 12, 2, 8, 8))
    for file in ("text.latent", "weights.latent"):
        with pytest.raises(PromptFailed) as failed:
            host.run(load(file).nodes)
        assert failed.value.message["node_type"] == "LoadLatent"
        assert "secret" not in failed.value.message["exception_message"]


@pytest.mark.parametrize("kind", ["SaveVideo", "SaveLatent"])
def test_a_nul_in_a_name_to_save_under_fails_in_its_node(host: RunningHost, kind: str) -> None:
    with pytest.raises(PromptFailed) as failed:
        host.run(saving(kind, "nul\0escaped").nodes)
    assert failed.value.message["node_type"] == kind
    assert not escaped(host)


# Prompts that are not prompts


def changed(node: str, **fields: Any) -> dict[str, Any]:
    prompt = copy.deepcopy(workflow("text_to_video_tiny"))
    prompt[node].update(fields)
    return prompt


def without(node: str, name: str) -> dict[str, Any]:
    prompt = workflow("text_to_video_tiny")
    del prompt[node]["inputs"][name]
    return prompt


@pytest.mark.parametrize(
    ("prompt", "node", "kind", "details"),
    [
        (with_inputs("7", steps="many"), "7", "invalid_input_type", "steps, many"),
        (with_inputs("6", frames=None), "6", "invalid_input_type", "frames, None"),
        (with_inputs("7", cfg=[1]), "7", "bad_linked_input", "cfg"),
        (with_inputs("7", model=["2", 0, 0]), "7", "bad_linked_input", "model"),
        (with_inputs("7", model=["3", 0]), "7", "return_type_mismatch", "type(VAE) mismatch input_type(MODEL)"),
        (with_inputs("2", dit_name=["4", 0]), "2", "return_type_mismatch", "received_type(CONDITIONING)"),
        (with_inputs("7", steps=1001), "7", "value_bigger_than_max", "steps"),
        (with_inputs("7", cfg=float("inf")), "7", "value_bigger_than_max", "cfg"),
        (with_inputs("7", seed=-1), "7", "value_smaller_than_min", "seed"),
        (with_inputs("8", fps=0), "8", "custom_validation_failed", "fps is 0.0: it must be from 1.0"),
        # A link that leads nowhere: the host blames the node that has it, and says only the id, or the slot.
        (with_inputs("7", model=["77", 0]), "7", "exception_during_inner_validation", "'77'"),
        (with_inputs("7", model=["2", 7]), "7", "exception_during_inner_validation", "list index out of range"),
        (changed("9", inputs={}), "9", "required_input_missing", "video"),
    ],
)  # fmt: skip
def test_a_malformed_prompt_is_refused_with_the_node_that_is_wrong(
    host: RunningHost, prompt: dict[str, Any], node: str, kind: str, details: str
) -> None:
    status, answer = host.answer({"prompt": prompt})
    assert status == 400
    assert answer["error"]["type"] == "prompt_outputs_failed_validation"
    assert answer["node_errors"].keys() == {node}
    entry = answer["node_errors"][node]
    assert entry["class_type"] == workflow("text_to_video_tiny")[node]["class_type"]
    assert [kind, True] in [[error["type"], details in error["details"]] for error in entry["errors"]]


@pytest.mark.parametrize("node", workflow("text_to_video_tiny"))
def test_every_missing_input_is_named_with_its_node(host: RunningHost, node: str) -> None:
    kind = workflow("text_to_video_tiny")[node]["class_type"]
    required = host.get(f"/object_info/{kind}")[kind]["input"]["required"]
    for name in required:
        status, answer = host.answer({"prompt": without(node, name)})
        assert status == 400, name
        assert answer["node_errors"].keys() == {node}, name
        errors = answer["node_errors"][node]["errors"]
        assert [(error["type"], error["details"]) for error in errors] == [("required_input_missing", name)]


@pytest.mark.parametrize(
    ("prompt", "kind", "said"),
    [
        (changed("7", class_type="MochiVideoSampler2"), "invalid_prompt", "node MochiVideoSampler2 does not exist"),
        ({"9": {"inputs": {}}}, "invalid_prompt", "a node is missing the class_type property"),
        ({"9": ["SaveVideo"]}, "invalid_prompt", "a node is missing the class_type property"),
        ({}, "prompt_no_outputs", "Prompt has no outputs"),
        ({"6": workflow("text_to_video_tiny")["6"]}, "prompt_no_outputs", "Prompt has no outputs"),
    ],
    ids=["unknown kind of node", "no kind of node", "a node that is a list", "empty", "no output"],
)
def test_a_prompt_the_host_cannot_read_is_refused_as_a_whole(
    host: RunningHost, prompt: dict[str, Any], kind: str, said: str
) -> None:
    status, answer = host.answer({"prompt": prompt})
    assert status == 400 and answer["node_errors"] == {}
    assert answer["error"]["type"] == kind and said in answer["error"]["message"]
    if kind == "invalid_prompt":
        assert answer["error"]["details"] in ("Node ID '#7'", "Node ID '#9'")


@pytest.mark.parametrize("prompt", [[1, 2], "text", 5, None, {"9": None}], ids=repr)
def test_what_is_no_prompt_at_all_is_the_hosts_own_error_and_the_host_goes_on(host: RunningHost, prompt: Any) -> None:
    status, answer = host.answer({"prompt": prompt})
    assert (status, answer.splitlines()[0]) == (500, "500 Internal Server Error")
    status, answer = host.answer({})
    assert (status, answer["error"]["type"]) == (400, "no_prompt")
    graph = Graph()
    graph.probe("Latent", graph.size(), "size")
    assert host.tensors(graph, "size")["samples"].shape == (1, 12, 3, 8, 8)


@pytest.mark.parametrize(
    ("node", "option", "options"),
    [
        ("1", "dtype", "auto, bfloat16, float16, float32"),
        ("2", "dtype", "auto, bfloat16, float16, float32"),
        ("3", "dtype", "auto, bfloat16, float16, float32"),
        ("2", "attention", "auto, sdpa, flash, sage, reference"),
        ("2", "memory", "auto, resident, streamed"),
        ("6", "preset", "custom, 848x480 (released)"),
        ("7", "noise_device", "cpu, gpu, as the reference"),
        ("8", "mode", "streaming, full, tiled spatial, tiled blended"),
    ],
)
@pytest.mark.parametrize("value", ["from a newer version", "", 7, True, ["a", "b", "c"], {"a": 1}], ids=repr)
def test_a_choice_of_another_version_is_refused_with_the_choices_there_are(
    host: RunningHost, node: str, option: str, options: str, value: Any
) -> None:
    wrapped = {"__value__": value} if isinstance(value, list) else value  # a bare list would be a link
    status, answer = host.answer({"prompt": with_inputs(node, **{option: wrapped})})
    assert status == 400
    (details,) = {error["details"].split(" - ", 1)[1] for error in answer["node_errors"][node]["errors"]}
    assert details.startswith(f"{option} is {value!r}: it must be one of {options}")
    assert details.endswith("Choose one of them.")


def test_an_older_workflow_without_newer_optional_inputs_still_runs(host: RunningHost) -> None:
    prompt = without("7", "cfg_schedule")
    prompt["1"]["inputs"].pop("tokenizer", None)
    prompt["7"]["inputs"] |= {"steps": 2, "a_newer_input": "is not looked at"}
    assert host.saved(host.run(prompt))


def test_the_weights_that_the_watched_folder_holds_are_good(secrets: Path) -> None:
    assert load_file(secrets / SECRET), "so that a loader that got there would have opened it"
