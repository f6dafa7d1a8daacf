"""The DiT against the reference's outputs."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("no_gradients")
CASES = ("b1", "b1_empty", "b1_full", "b2", "b2_one_empty")


def run(goldens, dit, case, dtype, padding=None, **options):
    tensors = goldens.tensors("dit_cases")
    latents, sigma = (tensors[f"in/{case}/{name}"].to(dtype) for name in ("x", "sigma"))
    return dit(latents, sigma, *goldens.text(tensors, f"in/{case}/", dtype, padding), **options)


@pytest.mark.parametrize("case", CASES)
def test_output(goldens, golden_dit, dtype, case):
    out = run(goldens, golden_dit(dtype), case, dtype)
    goldens.check(out, goldens.tensors("dit_cases")[f"out_f64/{case}/out"], f"dit/{case}/out")


@pytest.mark.parametrize("case", CASES)
def test_nan_in_the_padding_changes_nothing(goldens, golden_dit, case):
    out = run(goldens, golden_dit(torch.float32), case, torch.float32, padding=float("nan"))
    assert torch.equal(out, run(goldens, golden_dit(torch.float32), case, torch.float32))


def test_gradient_path(goldens, golden_dit, dtype):
    """With gradients the CPU takes torch's own activations and whole tensors: the same numbers."""
    with torch.enable_grad():
        out = run(goldens, golden_dit(dtype), "b1", dtype)
    goldens.check(out, goldens.tensors("dit_cases")["out_f64/b1/out"], "dit/b1/out")


def test_streams_after_every_block(goldens, golden_dit, dtype):
    seen = {}

    def spy(index, block, *inputs):
        seen["c"] = inputs[2]
        visual, text = block(*inputs)
        seen[f"block{index}_x"], seen[f"block{index}_y"] = visual, text
        return visual, text

    run(goldens, golden_dit(dtype), "b1", dtype, run_block=spy)
    assert len(seen) == 7
    for name, actual in seen.items():
        goldens.check(actual, goldens.tensors("dit_cases")[f"out_f64/b1/trace/{name}"], f"dit/b1/trace/{name}")
