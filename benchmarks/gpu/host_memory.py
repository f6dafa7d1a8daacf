"""The real ComfyUI in each of its memory modes: how long a workflow takes, how much memory, and whether it differs.

    python benchmarks/gpu/host_memory.py [--models ~/ComfyUI/models --workflow workflows/api/text_to_video.json] ...
    python benchmarks/gpu/host_memory.py --device cpu --set 6.frames=7 7.steps=2

The host is `COMFYUI_PATH`, or the one that the tests run. For each mode it is started anew and runs the workflow twice:
with everything to be loaded, and once more with the next seed, when the models are there. Compared between the modes
are the latents and the frames of the saved video. By default it is the embedded small checkpoint, which shows that the
modes agree, not what they save; `--models` is a folder of model files as a host has it, `--set NODE.INPUT=VALUE`
changes the workflow.

Peaks are torch's own, asked from inside the host; `device_used_bytes` is the most of the whole device that was in use
at any look (five a second). With `--device cpu` the host knows no modes: it runs by default only, twice, which shows
whether it repeats itself.
"""

import argparse
import copy
import hashlib
import json
import math
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import av
import torch
from safetensors.torch import load_file

from benchmarks import harness
from benchmarks.gpu.session import Facts, default_output, hardware
from scripts import comfyui

PROBE = Path(__file__).with_name("host_probe.py")
MODES = {
    "default": (),
    "lowvram": ("--lowvram",),
    "novram": ("--novram",),
    "highvram": ("--highvram",),
    "no dynamic vram": ("--disable-dynamic-vram",),
}
CPU_MODES = {"default": ("--cpu",), "default again": ("--cpu",)}
LOOK_S = 0.2

Prompt = dict[str, dict[str, Any]]


# The workflow


def changed(prompt: Prompt, changes: Sequence[str]) -> Prompt:
    """The workflow with `NODE.INPUT=VALUE`; a value that is not JSON is text."""
    prompt = copy.deepcopy(prompt)
    for change in changes:
        place, _, text = change.partition("=")
        node, _, name = place.partition(".")
        if name not in prompt.get(node, {}).get("inputs", {}):
            raise SystemExit(f"--set {change}: the workflow has no input {name!r} of a node {node!r}")
        try:
            prompt[node]["inputs"][name] = json.loads(text)
        except ValueError:
            prompt[node]["inputs"][name] = text
    return prompt


def with_latents_saved(prompt: Prompt) -> Prompt:
    """The workflow that also saves what its samplers make."""
    samplers = [node for node, content in prompt.items() if "Sampler" in content["class_type"]]
    if not samplers:
        raise SystemExit("The workflow has no sampler, so there are no latents to compare: give one that has")
    saving = {
        f"save_latents_{node}": {
            "class_type": "SaveLatent",
            "inputs": {"samples": [node, 0], "filename_prefix": "latents/mochi"},
        }
        for node in samplers
    }
    return {**prompt, **saving}


def with_next_seed(prompt: Prompt) -> Prompt:
    """Another video, so that the host has to make it."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name in ("seed", "noise_seed"):
            if isinstance(node["inputs"].get(name), int):
                node["inputs"][name] += 1
    return prompt


# One run


class Watch(threading.Thread):
    """Looks at the host's `/system_stats` until it is stopped; keeps the most that was used of the device."""

    def __init__(self, host: comfyui.Host):
        super().__init__(daemon=True)
        self.most: int | None = None
        self.looks = 0
        self._host, self._stop_asked = host, threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(LOOK_S):
            try:
                (device, *_) = self._host.get("/system_stats")["devices"]
            except (OSError, ValueError):  # busy, or going
                continue
            # What torch has and does not use counts as free there, and as used here.
            used = device["vram_total"] - device["vram_free"] + device["torch_vram_free"]
            self.looks += 1
            if device["type"] != "cpu":
                self.most = max(self.most or 0, used)

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()


def run(host: comfyui.Host, prompt: Prompt) -> Facts:
    """The workflow's time, peaks, and what came out of it."""
    host.get("/mochi_benchmark/peaks")
    watch = Watch(host)
    watch.start()
    started = time.perf_counter()
    try:
        outputs = host.run(prompt)
        seconds = time.perf_counter() - started
    finally:
        watch.stop()
    saved = host.saved(outputs)
    return {
        "seconds": seconds,
        **host.get("/mochi_benchmark/peaks"),
        "device_used_bytes": watch.most,
        "looks": watch.looks,
        "outputs": {kind: digest for path in saved for kind, digest in [fingerprint(path)]},
    }


def fingerprint(path: Path) -> tuple[str, str]:
    """What a saved file is, and a hash of its content: of numbers and pixels, not of what is written beside them."""
    content = hashlib.sha256()
    if path.suffix == ".latent":
        content.update(load_file(path)["latent_tensor"].float().contiguous().numpy().tobytes())
        return "latents", content.hexdigest()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            content.update(frame.to_ndarray(format="rgb24").tobytes())
    return "frames", content.hexdigest()


@contextmanager
def started(mode: Sequence[str], models: Path | None, log: Path) -> Iterator[comfyui.Host]:
    """A host in a folder of its own, with the probe in it."""
    with tempfile.TemporaryDirectory(prefix="mochi-host-") as folder:
        base = Path(folder)
        (base / "custom_nodes").mkdir()
        shutil.copy(PROBE, base / "custom_nodes" / "mochi_benchmark_probe.py")
        if models is not None:
            (base / "models").symlink_to(models.resolve(), target_is_directory=True)
        else:
            for kind in ("diffusion_models", "text_encoders", "vae", "checkpoints", "loras"):
                (base / "models" / kind).mkdir(parents=True)
        with comfyui.Host(base, base / "output", log, tuple(mode)) as host:
            yield host


def measure(prompt: Prompt, mode: Sequence[str], models: Path | None, log: Path) -> Facts:
    """Both runs in one mode; why there are none, when the host does not start or a node fails."""
    runs: dict[str, Facts] = {}
    began = time.perf_counter()
    try:
        with started(mode, models, log) as host:
            start_s = time.perf_counter() - began
            version = host.get("/system_stats")["system"].get("comfyui_version")
            for name, wanted in (("cold", prompt), ("warm", with_next_seed(prompt))):
                runs[name] = run(host, wanted)
    except (RuntimeError, comfyui.PromptRefused, comfyui.PromptFailed, OSError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[-600:]}", "runs": runs}
    return {"comfyui": version, "start_s": start_s, "runs": runs}


# All modes


def modes(device: str, names: Sequence[str] | None) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The modes that this host has, and why the others are left out."""
    if device == "cpu":
        return CPU_MODES, {name: "the host has no memory modes on a CPU" for name in MODES if name not in CPU_MODES}
    known = (comfyui.path() / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    wanted = {name: flags for name, flags in MODES.items() if names is None or name in names}
    here = {name: flags for name, flags in wanted.items() if all(f'"{flag}"' in known for flag in flags)}
    return here, {name: "this host does not know it" for name in wanted if name not in here}


def identical(records: Mapping[str, Facts]) -> dict[str, bool]:
    """Whether each output is the same in all modes that ran."""
    found: dict[str, set[str]] = {}
    for record in records.values():
        for run_name, one in record.get("runs", {}).items():
            for kind, digest in one["outputs"].items():
                found.setdefault(f"{run_name} {kind}", set()).add(digest)
    return {name: len(digests) == 1 for name, digests in found.items()}


def print_mode(name: str, record: Facts) -> None:
    if "error" in record:
        print(f"{name}: {record['error']}", flush=True)
    for run_name, one in record["runs"].items():
        peaks = [
            f"{label[:-6].replace('_', ' ')} {value / 1e9:.2f} GB"
            for label, value in one.items()
            if label.endswith("_bytes") and value is not None
        ]
        print(f"{name}, {run_name}: {one['seconds']:.2f} s, {', '.join(peaks)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all that the host has")
    parser.add_argument("--workflow", type=Path, default=comfyui.REPO / "workflows" / "api" / "text_to_video_tiny.json")
    parser.add_argument("--set", nargs="*", default=(), metavar="NODE.INPUT=VALUE", help="changes in the workflow")
    parser.add_argument("--models", type=Path, help="a folder of model files as a host has it")
    parser.add_argument("--limit-s", type=float, help="start no host after this many seconds")
    parser.add_argument("--log", type=Path, default=comfyui.REPO / ".cache" / "logs" / "host-memory.log")
    parser.add_argument("--output", type=Path, help="default: results/gpu-host-memory-<device>-<date>.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try --device cpu")
    return options


def main() -> None:
    options = arguments()
    begun, device = time.monotonic(), torch.device(options.device)
    comfyui.fetch()
    prompt = with_latents_saved(changed(json.loads(options.workflow.read_text(encoding="utf-8")), options.set))
    here, missing = modes(options.device, options.modes)
    output = options.output or default_output(device, "host-memory")
    options.log.parent.mkdir(parents=True, exist_ok=True)
    options.log.write_bytes(b"")
    records: dict[str, Facts] = {}
    result = {
        "benchmark": "gpu_host_memory",
        "environment": {**harness.environment(), **hardware(device)},
        "settings": {name: str(value) for name, value in vars(options).items() if name != "output"},
        "workflow": prompt,
        "missing": missing,
        "modes": records,
        "identical": {},
    }
    for name, flags in here.items():
        if time.monotonic() - begun > (options.limit_s if options.limit_s is not None else math.inf):
            records[name] = {"skipped": "time limit"}
            continue
        records[name] = {"flags": flags, **measure(prompt, flags, options.models, options.log)}
        print_mode(name, records[name])
        result["identical"] = identical(records)
        harness.write_json(output, result)
    harness.print_skipped(missing)
    for what, same in result["identical"].items():
        print(f"{what}: {'identical in all modes' if same else 'NOT identical'}")
    harness.write_json(output, result)
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
