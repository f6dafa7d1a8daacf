"""Our nodes on hosts that are older and newer than this one: both are faked, inside the host's own process."""

from typing import Any

import pytest
from harness import found_inside

AGES = ("older", "newer")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return found_inside("version_guards.py")


@pytest.mark.parametrize("age", AGES)
def test_every_node_describes_itself_alike_to_a_host_that_knows_fewer_or_more_words(
    found: dict[str, Any], age: str
) -> None:
    assert found[f"{age}_is_faked"]
    assert len(found["here"]) >= 12
    assert found[age] == found["here"]


@pytest.mark.parametrize("age", AGES)
def test_a_word_that_the_host_does_not_know_is_left_out_before_it_raises(found: dict[str, Any], age: str) -> None:
    assert found[f"{age}_refuses_unknown"]
    assert found[f"{age}_filters_unknown"]


def test_aliases_reach_a_host_that_searches_by_them_and_only_that(found: dict[str, Any]) -> None:
    assert all(found["newer_aliases"])
    assert not any(found["older_aliases"])


def test_what_we_do_not_know_of_a_newer_host_keeps_its_defaults(found: dict[str, Any]) -> None:
    assert found["newer_defaults"]


def test_inputs_are_marked_as_advanced_in_the_way_that_the_host_has(found: dict[str, Any]) -> None:
    advanced = [marks["attribute"] + marks["extra"] for marks in found["marks"]]
    assert any(advanced)
    assert found["told_to_the_page"] == advanced
    assert found["marks_with"] == [{"attribute": names, "extra": []} for names in advanced]
    assert found["marks_without"] == [{"attribute": [], "extra": names} for names in advanced]


def test_the_device_is_named_to_hosts_that_ask_for_it(found: dict[str, Any]) -> None:
    assert found["inference_dtype_with_device"] == ["cpu"]
    assert found["inference_dtype_without_device"] == [None]


def test_weights_are_patched_by_the_host_s_own_choice_of_patcher(found: dict[str, Any]) -> None:
    assert found["patcher_with"] == "CoreModelPatcher"
    assert found["patcher_without"] == "ModelPatcher"


def test_running_out_of_memory_is_recognised_as_the_host_does(found: dict[str, Any]) -> None:
    assert found["out_of_memory_with"] == [False, True]
    assert found["out_of_memory_without"] == [True, False]


def test_work_is_on_its_device_where_the_host_may_use_several(found: dict[str, Any]) -> None:
    assert found["device_context_with"] == ["cpu"]
    assert found["device_context_without"] == ["cpu"]  # entered once in all: not where there is none


def test_dtypes_are_noted_once_weights_are_there_and_only_where_the_host_notes_them(found: dict[str, Any]) -> None:
    assert found["on_meta_when_archived"] == [False]
    assert found["loaded_with_archive"] == found["loaded_without_archive"] == "NativeDiT"


def test_free_memory_is_the_patcher_s_answer_where_it_has_one(found: dict[str, Any]) -> None:
    assert found["free_memory_with"] == 7
    assert found["free_memory_without"] == 5


def test_frames_have_the_dtype_that_the_host_wants_of_a_vae(found: dict[str, Any]) -> None:
    assert found["vae_output_with"] == "torch.bfloat16"
    assert found["vae_output_without"] == "torch.float32"


def test_scales_are_told_once_for_a_file_to_older_hosts_and_for_each_layer_to_newer_ones(found: dict[str, Any]) -> None:
    assert found["by_file"] == {
        "names": ["layer.scale_weight", "layer.weight"],
        "options": ["scaled_fp8"],
        "description": ["scaled_fp8"],
    }
    assert found["by_layer"] == {
        "names": ["layer.comfy_quant", "layer.weight", "layer.weight_scale"],
        "options": ["quantization_metadata"],
        "description": ["quant_config"],
    }


def test_layers_that_load_to_where_they_were_made_are_not_made_on_the_meta_device(found: dict[str, Any]) -> None:
    assert not found["meta_with"]
    assert found["meta_without"]


def test_a_scaled_layer_s_floats_are_found_in_the_host_s_way_of_holding_them(found: dict[str, Any]) -> None:
    assert found["floats"] == [6, 8, 3]
