"""What the pack asks of the device's memory, what it does without enough, and what outlives a failed decode."""

from typing import Any

import pytest
from harness import found_inside

# The whole clip at once and the clip in pieces round apart.
ROUNDING = 5e-6
AUTOSAVES = [f"mochi_video_autosave_0000{n}.latent" for n in (1, 2)]


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    return found_inside("in_process_memory.py")


@pytest.fixture
def found(everything: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    return everything[request.param]


def of(part: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("found", [part], indirect=True, ids=[""])


@of("decode")
def test_every_way_to_decode_97_frames_gives_the_same_video(found: dict[str, Any]) -> None:
    assert found["frames"] == [97, 64, 64, 3]
    assert found["host"] <= ROUNDING
    assert found["full"] <= ROUNDING
    assert found["tiled_3d"] <= ROUNDING
    assert found["node"] == found["host_tiled"] == found["batch"] == 0
    assert "without tiles" in found["host_tiled_said"][0]


@of("decode")
def test_a_decode_says_in_one_line_what_it_will_do(found: dict[str, Any]) -> None:
    lines = [line for line in found["host_tiled_said"] if "decode of" in line]
    assert len(lines) == 2  # two decodes
    for part in ("64x64, 97 frames", "kept frames on the device", "needs about 0.", "are free"):
        assert part in lines[0]


@of("decode")
def test_blended_tiles_may_be_of_any_number(found: dict[str, Any]) -> None:
    shape, mean = found["blended"]
    assert shape == [97, 64, 64, 3]
    assert 0 < mean < 0.05


@of("decode")
def test_tile_numbers_are_checked_before_anything_runs(found: dict[str, Any]) -> None:
    three, odd, none, many, *valid = found["bad_tiles"]
    assert three == "tile rows is 3: it must be a power of two. Use 1, 2, 4 or 8."
    assert "overlap is 3: it must be an even number" in odd
    assert none == "tile_rows is 0: it must be from 1 to 16. Use a number of that range."
    assert many == "tile_rows is 17: it must be from 1 to 16. Use a number of that range."
    assert valid == [True, True, True]


@of("decode")
def test_a_decode_that_runs_out_of_memory_once_goes_on_with_less(found: dict[str, Any]) -> None:
    assert found["once"] <= ROUNDING
    assert found["once_apart"] <= ROUNDING
    assert found["not_loaded"] <= ROUNDING
    for said, place in (("once_said", "device"), ("once_apart_said", "host"), ("not_loaded_said", "device")):
        (line,) = found[said]
        assert "ran out of memory; once more from the start" in line
        assert f"in smaller parts, kept frames on the {place}" in line


@of("autosave")
def test_latents_are_on_disk_while_a_clip_is_decoded_and_not_after(found: dict[str, Any]) -> None:
    assert found["during"] == [AUTOSAVES[:1], []]  # a clip, a single picture
    assert found["after"] == []


@of("autosave")
def test_a_decode_that_runs_out_of_memory_twice_keeps_the_latents(found: dict[str, Any]) -> None:
    said = found["twice"]
    assert said.startswith(
        "MemoryBudgetError: The streaming decode of 2 times 64x64, 97 frames ran out of memory twice"
    )
    assert AUTOSAVES[0] in said and "Load Latent" in said
    assert found["kept"] == AUTOSAVES[:1]
    assert found["loaded"] is True
    assert found["decoded_later"] == 0


@of("autosave")
def test_any_other_error_keeps_the_latents_too(found: dict[str, Any]) -> None:
    assert found["other_error"] == "RuntimeError: a kernel failed"
    (line,) = found["other_error_said"]
    assert AUTOSAVES[1] in line and "Load Latent" in line
    assert found["kept_both"] == AUTOSAVES


@of("autosave")
def test_an_interrupted_decode_stops_at_once_and_leaves_nothing(found: dict[str, Any]) -> None:
    assert found["interrupted"] == "InterruptProcessingException"
    assert found["interrupted_calls"] == 3
    assert found["after_interruption"] == found["kept_both"]
    assert found["decoded_after_interruption"] == 0


@of("autosave")
def test_latents_that_cannot_be_written_are_one_warning(found: dict[str, Any]) -> None:
    assert found["unwritable"] == 0
    (line,) = found["unwritable_said"]
    assert "not kept on disk" in line


@of("encode")
def test_every_way_to_encode_gives_the_same_latents(found: dict[str, Any]) -> None:
    assert found["host"] <= ROUNDING
    assert found["tiled_3d"] <= ROUNDING
    assert found["host_tiled"] == 0


@of("encode")
def test_an_encode_that_runs_out_of_memory_goes_on_with_less_once(found: dict[str, Any]) -> None:
    assert found["once"] <= ROUNDING
    (line,) = found["once_said"]
    assert "encode of 64x64, 13 frames ran out of memory; once more" in line
    assert found["twice"].startswith("MemoryBudgetError: The encode of 64x64, 13 frames ran out of memory twice")


@of("estimates")
def test_the_host_is_asked_to_make_the_room_that_is_needed(found: dict[str, Any]) -> None:
    assert found["asked"] == found["told"]
    assert found["told"][0] == found["decode"]


@of("estimates")
def test_a_decode_asks_for_no_more_when_the_clip_is_longer(found: dict[str, Any]) -> None:
    assert len(set(found["by_frames"])) == 1


@of("estimates")
def test_the_way_to_decode_follows_from_the_memory_there_is(found: dict[str, Any]) -> None:
    assert [name for name, *_ in found["ways"]] == [
        "all at once",
        "streamed, kept frames on the device",
        "streamed, kept frames on the host",
        "streamed in smaller parts, kept frames on the host",
    ]
    assert all(chosen and less for *_, chosen, less in found["ways"])
    assert found["ways"][1][1] < 6 and found["ways"][3][1] < 2.5  # GB, for 848x480
    assert found["too_small"] is True


@of("estimates")
def test_a_small_device_keeps_frames_on_the_host_and_says_so_before(found: dict[str, Any]) -> None:
    told, on_host, on_device = found["small_told"]
    assert told == on_host < on_device
    assert found["small"] == 0
    assert any("kept frames on the host" in line for line in found["small_said"])
    assert found["nothing_free"] == 0
    assert any("in smaller parts" in line for line in found["nothing_free_said"])


@of("forward")
def test_a_forward_that_runs_out_of_memory_is_run_again_in_chunks(found: dict[str, Any]) -> None:
    assert found["once"] <= 5e-5
    assert found["once_calls"] == 4  # of three steps: no step was done again but the one that failed
    (line,) = found["once_said"]
    assert "ran out of memory: from here in chunks of 1024 tokens" in line
    assert found["chunks_then"] == found["fewest"] == 1024
    assert found["chunks_afterwards"] is None
    assert found["afterwards"] == 0


@of("forward")
def test_a_second_time_is_an_error_that_says_what_would_help(found: dict[str, Any]) -> None:
    assert found["twice"].startswith("MemoryBudgetError: The transformer ran out of memory twice")
    assert "memory streamed" in found["twice"]
    assert found["after_twice"] == 0


@of("forward")
def test_weights_are_moved_out_of_a_full_device_with_their_patches(found: dict[str, Any]) -> None:
    assert found["lora_effect"] > 1e-3
    assert found["moved_out"] <= 5e-5
    (moved,) = found["moved"]
    assert found["weights"] / 4 <= moved < found["weights"]
    assert len(found["moved_out_said"]) == 1


@of("forward")
def test_a_forward_asks_for_what_it_keeps_alive(found: dict[str, Any]) -> None:
    for asked, counted in found["need"]:
        assert asked == counted
    assert found["need"][0] < found["need"][1]


@of("forward")
def test_a_forward_goes_in_chunks_where_it_does_not_fit_whole(found: dict[str, Any]) -> None:
    asked, counted = found["chunked_need"]
    assert asked == counted < found["need"][0][0]
    assert found["chunks"] == 16
    assert found["chunked"] <= 5e-5
    assert "in chunks of 16 tokens" in found["chunked_run"]


@of("forward")
def test_a_run_says_in_one_line_what_it_will_do(found: dict[str, Any]) -> None:
    (line,) = found["run_said"]
    for part in ("64x64, 7 frames, 2 steps", "of weights", "are free of", "all weights stay on the device"):
        assert part in line
