"""Our networks against ComfyUI's own, with the same weights: where they agree, and where native Mochi errs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("no_gradients")
PROMPT, EMPTY, TWO = "b1", "b1_empty", "b2"
DIT_INPUTS = {"latents": "x", "sigma": "sigma"}


def largest_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def ours(golden_dit, golden_decoder, golden_encoder):
    return {
        "dit": golden_dit(torch.float32),
        "decoder": golden_decoder(torch.float32),
        "encoder": golden_encoder(torch.float32),
    }


@pytest.fixture(scope="module")
def cases(goldens):
    """Inputs by the names that native_runner.py reads."""
    tensors = goldens.tensors("dit_cases")
    inputs = {}
    for case in (PROMPT, EMPTY, TWO):
        features, mask = goldens.text(tensors, f"in/{case}/", torch.float32)
        inputs |= {f"dit.case.{case}.{name}": tensors[f"in/{case}/{key}"] for name, key in DIT_INPUTS.items()}
        inputs |= {f"dit.case.{case}.features": features, f"dit.case.{case}.mask": mask}
    video = goldens.tensors("vae_encoder_cases")["in/video"]
    inputs["decoder.case.clip"] = goldens.tensors("vae_decoder_cases")["in/z"]
    inputs |= {"encoder.case.clip": video, "encoder.case.image": video[:, :, :1].contiguous()}
    return inputs


@pytest.fixture(scope="module")
def native(comfyui_path, ours, cases, tmp_path_factory):
    """What ComfyUI's networks make of the cases."""
    folder = tmp_path_factory.mktemp("native")
    weights = {f"{part}.weights.{k}": v for part, network in ours.items() for k, v in network.state_dict().items()}
    save_file(weights | cases, folder / "in.safetensors")
    runner = Path(__file__).with_name("native_runner.py")
    # -O, because native Mochi asserts the released model's width.
    command = [sys.executable, "-O", runner, comfyui_path, folder / "in.safetensors", folder / "out.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")


def our_dit(ours, cases, case):
    inputs = (cases[f"dit.case.{case}.{name}"] for name in ("latents", "sigma", "features", "mask"))
    return ours["dit"](*inputs)


def test_dit_agrees_for_one_prompt(ours, cases, native):
    """Native predicts noise minus clean: the opposite sign."""
    assert largest_difference(our_dit(ours, cases, PROMPT), -native[f"dit.case.{PROMPT}"]) < 1e-5


def test_dit_differs_for_the_empty_prompt(ours, cases, native):
    """Native attends to one padding token where the reference attends to none (`max(1, number of tokens)`)."""
    assert largest_difference(our_dit(ours, cases, EMPTY), -native[f"dit.case.{EMPTY}"]) > 1e-2


def test_dit_differs_for_prompts_of_different_length(ours, cases, native):
    """Native crops all prompts of a batch to one length, so the shorter ones attend to padding."""
    assert largest_difference(our_dit(ours, cases, TWO), -native[f"dit.case.{TWO}"]) > 1e-2


def test_decoder_agrees(ours, cases, native):
    assert largest_difference(ours["decoder"](cases["decoder.case.clip"]), native["decoder.case.clip"]) < 1e-5


def test_encoder_agrees_on_an_image(ours, cases, native):
    # Native makes the sines of large angles in float32; ours takes whole turns off first.
    assert largest_difference(ours["encoder"](cases["encoder.case.image"]).mean, native["encoder.case.image"]) < 1e-4


def test_encoder_differs_on_a_clip(ours, cases, native):
    """Native's temporal attention has no causal mask: early frames see later ones."""
    assert largest_difference(ours["encoder"](cases["encoder.case.clip"]).mean, native["encoder.case.clip"]) > 1e-2
