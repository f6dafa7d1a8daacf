"""Each benchmark script runs, very small, and writes the JSON that it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import dit_forward, harness, live_bytes, peers, vae_decode, vae_memory
from benchmarks.gpu.overlap import overlap
from mochi_core.config import TINY

ROOT = Path(__file__).resolve().parents[2]
SMALL_DIT = "--depth 2 --visual-dim 192 --text-dim 96 --text-features 64 --latents 2x4x4 --text-tokens 5"
SMALL_VAE = "--base 32 --multipliers 1 1 2 3 --res-blocks 0 1 1 1 1 --rows 2 --latent-frames 2"
SMALL_QUANT = "--depth 2 --visual-dim 256 --text-dim 96 --heads 2 --text-features 64 --latents 2x4x4 --text-tokens 5"
FULL_SIZE = "--device cpu --config tiny --depth 2 --width 64 --height 64 --frames 7 --repeats 1"
ENVIRONMENT = {"cpu", "cores", "threads", "torch", "python", "commit", "dirty", "date"}
MEASURED = {"median_s", "min_s", "ratio_to_ours", "ratio_to_floor", "peak_rss_growth_bytes", "times_s"}

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def run(tmp_path: Path, script: str, options: str) -> dict[str, Any]:
    output = tmp_path / "folder" / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options.split(), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["environment"].keys() >= ENVIRONMENT
    return result


@linux_only
def test_dit_forward_against_its_floor(tmp_path: Path) -> None:
    result = run(tmp_path, "dit_forward.py", f"{SMALL_DIT} --dtype float32 --rounds 2 --peers")
    contenders = result["results"]["float32"]["contenders"]
    assert contenders.keys() == {"ours", "floor"}
    assert contenders["ours"].keys() == MEASURED
    assert len(contenders["ours"]["times_s"]) == result["settings"]["rounds"] == 2
    assert contenders["ours"]["peak_rss_growth_bytes"] > 0
    assert contenders["floor"]["peak_rss_growth_bytes"] is None


def test_diffusers_dit_has_our_weights() -> None:
    pytest.importorskip("diffusers")
    case = dit_forward.Case(TINY.dit, (2, 4, 4), text_tokens=5, text_slots=16, dtype=torch.float32, threads=1)
    model, inputs = case.model(), case.inputs()
    theirs = peers.diffusers_dit(TINY.dit, model.state_dict())
    expected = model(inputs.latents, inputs.sigma, inputs.features, inputs.mask)
    assert harness.difference(peers.run_diffusers_dit(theirs, inputs), expected)["max_abs"] < 1e-4


def test_diffusers_decoder_has_our_weights() -> None:
    pytest.importorskip("diffusers")
    case = vae_decode.Case(TINY.vae, (4, 2, 2), torch.float32, threads=1)
    model, latents = case.model(), case.inputs()
    frames = peers.run_diffusers_decoder(peers.diffusers_decoder(TINY.vae, model.state_dict()), TINY.vae, latents)
    # The early frames are another function; far from them the two agree.
    assert harness.difference(frames[:, :, -1], model(latents)[:, :, -1])["max_abs"] < 1e-4


@linux_only
def test_vae_decode(tmp_path: Path) -> None:
    result = run(tmp_path, "vae_decode.py", f"{SMALL_VAE} --dtype float32 --rounds 1 --peers")
    one_length = result["results"]["float32"]["2"]
    assert one_length["contenders"].keys() == {"ours", "ours stream", "floor"}
    assert one_length["contenders"]["ours stream"].keys() == MEASURED
    assert one_length["differences"]["ours stream"]["max_abs"] < 1e-4


@linux_only
def test_vae_memory(tmp_path: Path) -> None:
    small = f"{SMALL_VAE} --rows 4 --latent-frames 2 5 --compare-at 2 --dtype float32 --rounds 1 --peers"
    full = "--config tiny --width 64 --height 64 --released-latent-frames 3 --kept-on-device 0"
    result = run(tmp_path, "vae_memory.py", f"{small} {full}")
    float32 = result["results"]["float32"]
    short, long = (float32["memory"][frames] for frames in ("2", "5"))
    assert short.keys() == {"ours stream", "ours"}
    assert long["ours"]["live_bytes"] > 2 * short["ours"]["live_bytes"]
    ((claim, row),) = float32["claims"].items()
    assert "from 2 to 5" in claim and row["holds"]
    assert row["value"] == long["ours stream"]["live_bytes"] / short["ours stream"]["live_bytes"]
    assert float32["times"]["ratio_to_fastest_peer"] is None and not float32["skipped"]
    forms = {(row["what"], row["form"]): row for row in result["released"]}
    assert len(forms) == len(result["released"]) == 5
    assert all(row["device_bytes"] <= row.get("estimated_device_bytes", row["device_bytes"]) for row in forms.values())
    stagewise = forms["encode", "stagewise"]
    assert 0 < stagewise["host_bytes"] <= stagewise["estimated_host_bytes"]
    on_host = forms["decode", "streaming, frames on the host"]
    assert on_host["host_bytes"] > 0 == forms["decode", "streaming"]["host_bytes"]
    assert on_host["device_bytes"] < forms["decode", "streaming"]["device_bytes"]


def test_peers_decode_as_many_frames_in_tiles_as_whole() -> None:
    pytest.importorskip("diffusers")
    case = vae_decode.Case(TINY.vae, (3, 4, 4), torch.float32, threads=1)
    model, latents = case.model(), case.inputs()
    for name in vae_memory.PEERS["diffusers"]:
        assert vae_memory.decoded(name, model)(latents) == 13 * 32 * 32 * 3 * 4


def test_what_the_vae_must_hold_to() -> None:
    def said(longest: int, seconds: float) -> list[bool]:
        memory = {3: {"ours stream": {"live_bytes": 100}}, 13: {}}
        memory[13] = {"ours stream": {"live_bytes": longest}, "native": {"live_bytes": 420}}
        memory[13]["native tiled"] = {"live_bytes": 1}  # not a whole decode
        found = vae_memory.claims(memory, {"ratio_to_fastest_peer": seconds}, 13)
        return [row["holds"] for row in found.values()]

    assert said(105, 0.9) == [True, True, True]
    assert said(108, 0.91) == [True, False, False]
    assert said(110, 0.5) == [False, False, True]


@linux_only
def test_load_weights(tmp_path: Path) -> None:
    result = run(tmp_path, "load_weights.py", "--megabytes 100 --rounds 1")
    assert result["file_bytes"] == pytest.approx(100e6, rel=0.2)
    assert {"load_s", "touch_s", "peak_rss_growth_bytes"} <= result.keys()
    # a few MB of code and headers weigh more here than in a full-size file
    assert result["peak_over_file"] < 1.15


def test_attention(tmp_path: Path) -> None:
    sizes = "--heads 2 --head-dim 16 --visual-tokens 24 --text-tokens 8 --ragged-text-tokens 3"
    result = run(tmp_path, "attention.py", f"{sizes} --dtype float32 --rounds 2")["results"]["float32"]
    assert result["missing"].keys() == {"flash", "sage"}
    assert all(error["max_abs"] < 1e-5 for error in result["errors"].values())
    assert result["cases"]["24 + 8"]["kernels"].keys() == {"reference", "sdpa"}
    ragged = result["cases"]["24 + 8 / 3"]
    assert ragged["kernels"].keys() == {"reference", "sdpa", "sdpa with mask"} and not ragged["skipped"]
    assert ragged["kernels"]["sdpa"]["ratio_to_sdpa"] == 1
    assert all(len(row["times_s"]) == 2 and row["flops_per_s"] > 0 for row in ragged["kernels"].values())


def test_quant(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    formats = "fp8_scaled q8_0 q4_0 gguf_q4_0 gguf_q4_k"
    result = run(
        tmp_path, "quant.py", f"{SMALL_QUANT} --device cpu --formats {formats} --rounds 2 --frames 7 --steps 2"
    )
    rows = result["results"]
    assert list(rows) == ["bf16", *formats.split()]
    assert all(len(row["load"]["times_s"]) == len(row["forward"]["times_s"]) == 2 for row in rows.values())
    assert rows["bf16"]["forward"]["ratio_to_bf16"] == 1 and rows["bf16"]["dequantize"] is None
    assert rows["bf16"]["error"] == {"max_abs": 0, "relative_rms": 0, "psnr_db": [None, None]}
    assert len({row["packed_layers"] for row in rows.values()} - {0}) == 1
    assert all(row["dequantize"]["median_s"] > 0 for name, row in rows.items() if name != "bf16")
    # Both writers pack alike; of random blocks no error is measured.
    assert rows["gguf_q4_0"]["error"] == rows["q4_0"]["error"] and rows["gguf_q4_k"]["error"] is None
    assert 0 == rows["bf16"]["weights_relative_rms"] < rows["q8_0"]["weights_relative_rms"] < 0.01
    errors = [rows[name]["error"]["relative_rms"] for name in ("q8_0", "fp8_scaled", "q4_0")]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.2


def test_live_bytes_are_counted_from_their_making_to_their_last_reference() -> None:
    before = torch.zeros(1000)
    with live_bytes.LiveBytes() as live:
        view = before.view(10, 100)  # what was there before weighs nothing
        first = view + 1
        part = first[0]
        del first
        assert live.now == 4000  # the view keeps all of it
        second = torch.zeros(25, device="meta")
        del part, view
    assert (live.now, live.peak) == (100, 4100)
    assert dict(live.now_on) == {"cpu": 0, "meta": 100} and dict(live.peak_on) == {"cpu": 4000, "meta": 100}
    assert live.take_peak("cpu") == 4000 and live.take_peak("cpu") == 0
    del second
    assert live.now == 0


@linux_only
def test_streaming_plan(tmp_path: Path) -> None:
    small = "--config tiny --width 256 --height 256 --frames 31 --text-tokens 16 --real-latents 2x8x8 --real-width 96"
    result = run(tmp_path, "streaming_plan.py", f"{small} --dtype float32 --budgets 0.001 0.058 1")
    denoise = result["denoise"]
    whole, cut = (max(denoise[name]["counted_bytes"].values()) for name in ("whole", "cut"))
    assert cut < whole <= denoise["whole"]["estimated_bytes"] < 1.05 * whole
    too_small, tight, ample = result["budgets"]
    assert "needs at least" in too_small["error"]
    assert tight["decode"]["frames_on_host"] > 0 == ample["decode"]["frames_on_host"]
    assert ample["dit"]["resident"] == 4 and ample["dit"]["tokens_at_once"] is None
    for row in (tight, ample):
        assert row["fits"]
        assert 0.9 * row["dit"]["estimated_bytes"] < row["peak_bytes"]["dit"] <= row["dit"]["estimated_bytes"]
        assert 0.6 * row["decode"]["estimated_bytes"] < row["peak_bytes"]["decode"] <= row["decode"]["estimated_bytes"]
    for row in result["reality"]:
        assert row["counted_bytes"] == row["really_counted_bytes"] <= row["estimated_bytes"]


SMALL_TRAINING = "--config tiny --width 64 --height 64 --frames 7 --text-tokens 16 --rounds 1"


def test_training_memory(tmp_path: Path) -> None:
    small = "--small 4 2 64 32 --small-latents 2x8x8 --dtype float32"
    budgets = "--budgets 0.001 0.02 1 --counted-budgets 0.02 1"
    result = run(tmp_path, "training_memory.py", f"{SMALL_TRAINING} {small} {budgets}")
    ways = result["steps"]["float32"]["ways"]
    assert len(ways) == 8 and all(row["identical_gradients"] and len(row["times_s"]) == 1 for row in ways.values())
    bytes_ = {name: row["counted_bytes"] for name, row in ways.items()}
    everything = bytes_["nothing recomputed"]
    assert all(count < everything for name, count in bytes_.items() if name != "nothing recomputed")
    assert bytes_["whole blocks, all streamed"] < min(bytes_["whole blocks, half streamed"], bytes_["whole blocks"])
    for row in ways.values():
        assert row["really_counted_bytes"] is None or row["really_counted_bytes"] <= row["estimated_bytes"]
    (clip,) = result["full_size"]
    reference = clip["reference"]
    assert 0 < reference["counted_bytes"] <= reference["estimated_bytes"]
    too_small, *planned = clip["budgets"]
    assert "needs at least" in too_small["error"]
    assert all(row["fits"] and row["counted_bytes"] <= row["estimated_bytes"] for row in planned)


def test_training_on_a_device_dry_run(tmp_path: Path) -> None:
    records = run(tmp_path, "training_memory.py", f"{SMALL_TRAINING} --really --budgets 0.001 1")["device"]
    reference, too_small, planned = records
    assert reference["what"] == "reference" and reference["seconds"] > 0 and reference["checkpoints"]["qkv"] >= 48
    assert "needs at least" in too_small["error"]
    assert planned["resident"] == 4 and planned["budget_bytes"] == 1e9


def test_full_size_dry_run(tmp_path: Path) -> None:
    result = run(tmp_path, "gpu/full_size.py", f"{FULL_SIZE} --kernels sdpa --peers")
    records = result["records"]
    assert result["matrix_peak_flops_per_s"] > 0
    assert {r["what"] for r in records} == {"matrix products", "attention", "guided step", "decode", "text encoding"}
    assert not [r for r in records if "error" in r or "skipped" in r]
    steps = [r for r in records if r["what"] == "guided step"]
    assert {r["form"] for r in steps} == {"sequential", "batched"}
    assert all(r.keys() >= {"seconds", "flops_per_s", "of_matrix_peak", "peak_bytes"} for r in steps)


def test_full_size_starts_nothing_after_its_limit(tmp_path: Path) -> None:
    result = run(tmp_path, "gpu/full_size.py", f"{FULL_SIZE} --limit-s 0")
    assert result["records"]
    assert all(r["skipped"] == "time limit" for r in result["records"])


STREAMING = "--device cpu --config tiny --width 64 --height 64 --frames 7 --rounds 1 --resident 0 --tokens-at-once 5"


def test_gpu_streaming_dry_run(tmp_path: Path) -> None:
    result = run(tmp_path, "gpu/streaming.py", f"{STREAMING} --caps 0.001 6 --decode-caps 1 --kept-on-device 0")
    records = result["records"]
    by_name: dict[str, list[Any]] = {}
    for record in records:
        by_name.setdefault(record["what"], []).append(record)
    assert by_name.keys() == {"pace", "tokens", "trace", "decode", "capped step", "capped decode"}
    assert all("no copies" in record["skipped"] for record in by_name["trace"])
    for record in by_name["pace"]:
        assert record["identical"] and record["ratio"] > 0 and record["bytes_copied_a_step"] > 1e6
    assert by_name["tokens"][0]["difference"]["max_abs"] < 1e-2
    assert by_name["decode"][0]["identical"]
    for record in by_name["capped step"]:
        assert record["ran"] == (record["cap_gb"] == 6)
        assert record["ran"] or "needs at least" in record["error"]
    assert all(record["ran"] for record in by_name["capped decode"])


def test_gpu_streaming_starts_nothing_after_its_limit(tmp_path: Path) -> None:
    records = run(tmp_path, "gpu/streaming.py", f"{STREAMING} --sections caps decode --limit-s 0")["records"]
    assert records and all(record["skipped"] == "time limit" for record in records)


def test_overlap_of_copies_and_kernels() -> None:
    def event(category: str, start: float, length: float, stream: int, name: str = "") -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": start, "dur": length, "args": {"stream": stream, "bytes": 10}}

    host_to_device = "Memcpy HtoD (Pinned -> Device)"
    events = [
        event("kernel", 10, 10, 7),
        event("kernel", 15, 15, 7),  # 10 to 30 together
        event("kernel", 40, 10, 7),
        event("kernel", 0, 100, 9, "on the stream of the copies"),
        event("gpu_memcpy", 0, 20, 9, host_to_device),  # 10 of 20 hidden
        event("gpu_memcpy", 25, 20, 9, host_to_device),  # 5 and 5 of 20
        event("gpu_memcpy", 0, 50, 9, "Memcpy DtoH (Device -> Pinned)"),
        {"ph": "M", "name": "process_name"},
    ]
    found = overlap(events)
    assert found["overlap_share"] == pytest.approx(20 / 40)
    assert (found["copies"], found["bytes_copied"], found["copies_s"]) == (2, 20, 40e-6)
    assert overlap([e for e in events if e.get("args", {}).get("stream") == 7])["overlap_share"] is None
