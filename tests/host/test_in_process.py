"""What only the host's own process can see: patches, wrappers, memory choices and weights that are partly loaded."""

from typing import Any

import pytest
from harness import found_inside

from mochi_core.latents import LatentStatistics
from mochi_core.weights.build import TINY_DIT
from mochi_core.weights.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return found_inside("in_process.py")


def test_the_pack_registers_its_core_under_one_name(found: dict[str, Any]) -> None:
    assert found["core_is_top_level"]


def test_our_model_is_a_genmo_mochi_with_the_latents_of_its_checkpoint(found: dict[str, Any]) -> None:
    assert found["is_genmo_mochi"]
    statistics = LatentStatistics.from_metadata(Checkpoint(TINY_DIT).metadata)
    assert found["latent_mean"] == pytest.approx(statistics.mean[0])


def test_block_replacements_and_wrappers_of_the_host_are_called(found: dict[str, Any]) -> None:
    assert found["replaced_block_calls"] == found["wrapper_calls"] == 3  # one batched forward a step
    assert found["replaced_block_difference"] == found["wrapped_difference"] == 0


def test_memory_choices_change_where_weights_are_and_not_the_video(found: dict[str, Any]) -> None:
    assert found["resident_difference"] == 0
    assert found["streamed_difference"] <= 5e-5  # the host then runs the prompts one by one, which rounds apart
    assert found["streamed_asks_for_all"] and found["auto_asks_for_some"]


def test_host_patches_apply_to_whole_and_partly_loaded_weights_alike(found: dict[str, Any]) -> None:
    assert found["patched_keys"] == 1
    assert found["patch_effect"] > 1e-3
    assert found.get("partly_loaded_difference", 0) <= 5e-5
    assert found["unpatched_difference"] == 0


@pytest.mark.parametrize("kind", ["keep", "q8_0", "fp8_scaled"])
def test_loras_beside_quantised_weights_belong_to_their_clone(found: dict[str, Any], kind: str) -> None:
    assert found[f"{kind}_lora_effect"] > 1e-2
    assert found[f"{kind}_clones_apart"] == 0
    assert found[f"{kind}_chained"] <= 5e-5
    assert found.get(f"{kind}_partly_loaded", 0) <= 5e-5


@pytest.mark.parametrize("kind", ["keep", "q8_0", "fp8_scaled"])
def test_an_interrupted_run_leaves_no_lora_behind(found: dict[str, Any], kind: str) -> None:
    assert found[f"{kind}_hooks_left"] == 0
    assert found[f"{kind}_interrupted"] == 0


@pytest.mark.parametrize("kind", ["keep", "q8_0", "fp8_scaled"])
def test_dora_over_every_format_is_that_over_the_same_weights_as_floats(found: dict[str, Any], kind: str) -> None:
    assert found[f"{kind}_dora_effect"] > 1e-2
    assert found[f"{kind}_dora"] <= 1e-4


def test_a_patch_of_packed_weights_is_an_error_wherever_they_are(found: dict[str, Any]) -> None:
    assert found["packed_and_patched"]
    assert all("Use Mochi Video LoRA Loader" in said for said in found["packed_and_patched"])


@pytest.mark.parametrize("kind", ["keep", "q8_0", "fp8_scaled"])
def test_what_the_host_saves_of_our_model_loads_again(found: dict[str, Any], kind: str) -> None:
    assert found[f"{kind}_saved"] <= 5e-5
