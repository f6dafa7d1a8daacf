"""What each weight format saves and costs: bytes of the file, loading, one forward, and errors of a trained model.

    python benchmarks/quant.py [--device cuda] [--formats bf16 q8_0 gguf_q4_0] [--rounds 15] ...

Speed is that of a random DiT that computes in bfloat16, on the device: by default a medium one on a CPU, four blocks of
the released width on a GPU. `dequantize` is the part of a forward that makes floats of the stored matrices, alone.
Loading ends when every tensor has been copied to the device; files lie in the page cache. The error of the weights is
that of the random DiT's matrices, whose standard deviation is one over the root of their inputs. The other errors are
those of the embedded checkpoint, in float32 on the CPU, so that only the weights differ from the bf16 file's: one
forward, and videos of the same prompts and seed.

Files are made by `convert`, GGUF by the gguf package's own writer. Nothing here can write K-quants: their blocks are
random, which says something of their speed and nothing of their errors. Matrices whose rows are no whole blocks are
packed as Q8_0 instead.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.dit_forward import Case
from benchmarks.gpu.session import hardware
from benchmarks.load_weights import write_file
from mochi_core.config import TINY, DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.pipeline import MochiPipeline, TextToVideo
from mochi_core.sampling.schedule import linear_quadratic
from mochi_core.shapes import VideoSize
from mochi_core.weights.build import TINY_DIT, load_dit
from mochi_core.weights.checkpoint import Checkpoint
from mochi_core.weights.convert import convert
from mochi_core.weights.formats import plain
from mochi_core.weights.quantized import QuantizedLinear

BASE = "bf16"
CONVERTED = (BASE, "fp16", "fp8", "fp8_scaled", "q8_0", "q4_0")
GGUF = {"gguf_q8_0": "Q8_0", "gguf_q4_0": "Q4_0"}
RANDOM_GGUF = {"gguf_q6_k": "Q6_K", "gguf_q5_k": "Q5_K", "gguf_q4_k": "Q4_K"}
FORMATS = (*CONVERTED, *GGUF, *RANDOM_GGUF)
# Where a block of random bytes has its float16 scales.
SCALES_AT = {"Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2)}
ANY_WIDTH = "Q8_0"

PROMPTS = ("a red circle moving right on a black background", "a green triangle rising on a black background")
CFG_SCALE = 4.0

COMPUTE = torch.bfloat16
TEXT_SLOTS = 256


@dataclass(frozen=True)
class Defaults:
    """The DiT whose speed is measured, and what it is given."""

    config: DiTConfig
    latents: tuple[int, int, int]


# On a GPU 25 frames of 848x480.
DEFAULTS = {
    "cpu": Defaults(DiTConfig(depth=4, heads=6, visual_dim=768, text_dim=384, text_feature_dim=1024), (4, 32, 32)),
    "cuda": Defaults(DiTConfig(depth=4), (5, 60, 106)),
}


# Files


def written(formats: Sequence[str], source: Path, folder: Path) -> dict[str, Path]:
    """The weights of `source`, a DiT in genmo's names, in each format."""
    paths: dict[str, Path] = {}
    for format in formats:
        if format in CONVERTED:
            paths[format] = folder / f"{format}.safetensors"
            convert(source, paths[format], "genmo", format)
        else:
            paths[format] = folder / f"{format}.gguf"
            write_gguf(source, paths[format], (GGUF | RANDOM_GGUF)[format])
    return paths


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether quantised files pack this weight."""
    return name.startswith("blocks.") and len(shape) == 2


def write_gguf(source: Path, path: Path, kind: str) -> None:
    """The matrices inside the blocks packed, the rest in bfloat16, as `convert` has it."""
    import gguf

    checkpoint, generator = Checkpoint(source), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "mochi")
    for key, value in checkpoint.metadata.items():
        writer.add_string(key, value)
    for name in checkpoint.names:
        weight: Any = checkpoint.tensor(name)
        if is_matrix(name, weight.shape):
            data, stored = packed(weight, kind, generator)
        else:
            data, stored = weight.to(torch.bfloat16).view(torch.uint8).numpy(), "BF16"
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed(weight: torch.Tensor, kind: str, generator: np.random.Generator) -> tuple[np.ndarray, str]:
    """A matrix as rows of blocks, and the kind they are of: random ones where nothing can write the kind asked for."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows, columns = weight.shape
    if columns % values:
        return packed(weight, ANY_WIDTH, generator)
    if kind not in SCALES_AT:
        return gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind]), kind
    blocks = generator.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for place in SCALES_AT[kind]:
        scales = generator.uniform(0.5e-4, 2e-4, blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1), kind


# Speed


@torch.inference_mode()
def speeds(paths: Mapping[str, Path], case: Case, device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Size, loading, forward and dequantisation of each file, in turns."""
    load_times = harness.time_in_turns({name: partial(load, path, device) for name, path in paths.items()}, rounds)

    models = {name: load_dit(path, dtype=COMPUTE)[0].to(device) for name, path in paths.items()}
    layers = {name: [m for m in model.modules() if isinstance(m, QuantizedLinear)] for name, model in models.items()}
    inputs = case.inputs()
    given = [x.to(device) for x in (inputs.latents, inputs.sigma, inputs.features, inputs.mask)]
    runs: dict[str, harness.Run] = {}
    for name, model in models.items():
        runs[name] = synchronized(partial(model, *given), device)
        if layers[name]:
            runs[f"{name} dequantize"] = synchronized(partial(dequantize, layers[name]), device)
    for name, model in models.items():
        if not model(*given).isfinite().all():
            raise RuntimeError(f"The forward of {name} has values that are not numbers")
    times = harness.time_in_turns(runs, rounds)

    base_bytes = paths[BASE].stat().st_size
    results: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        file_bytes = path.stat().st_size
        results[name] = {
            "file_bytes": file_bytes,
            "file_to_bf16": file_bytes / base_bytes,
            "packed_layers": len(layers[name]),
            "weights_relative_rms": None if name in RANDOM_GGUF else weight_error(path, paths[BASE]),
            "load": summary(load_times[name], load_times[BASE]),
            "forward": summary(times[name], times[BASE]),
            # against the whole forward of bf16, as all here
            "dequantize": summary(times[f"{name} dequantize"], times[BASE]) if layers[name] else None,
        }
    return results


def load(path: Path, device: torch.device) -> None:
    """From the file to a copy of every tensor on the device."""
    model, _ = load_dit(path, dtype=COMPUTE)
    for tensor in model.state_dict().values():
        tensor.to(device, copy=True)


def dequantize(layers: Sequence[QuantizedLinear]) -> None:
    for layer in layers:
        layer.dequantized(COMPUTE)


def synchronized(work: Callable[[], Any], device: torch.device) -> harness.Run:
    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def summary(times: list[float], base: list[float]) -> dict[str, Any]:
    return {
        "median_s": statistics.median(times),
        "ratio_to_bf16": harness.paired_ratio(times, base),
        "times_s": times,
    }


# Errors


def weight_error(path: Path, base: Path) -> float:
    """Relative RMS of the matrices inside the blocks."""
    held, expected = Checkpoint(path), Checkpoint(base)
    off = total = 0.0
    for name, entry in expected.entries.items():
        if is_matrix(name, entry.shape):
            weight = plain(expected.tensor(name), torch.float32)
            off += (plain(held.tensor(name), torch.float32) - weight).square().sum(dtype=torch.float64).item()
            total += weight.square().sum(dtype=torch.float64).item()
    return math.sqrt(off / total)


@torch.inference_mode()
def errors(paths: Mapping[str, Path], frames: int, steps: int) -> dict[str, dict[str, Any]]:
    """How far the embedded checkpoint's output is from what its bf16 file gives, in float32 on the CPU."""
    pipeline = MochiPipeline.tiny()

    def outputs(path: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
        dit, _ = load_dit(path, dtype=torch.float32)
        size, schedule = VideoSize(64, 64, frames), linear_quadratic(steps)
        requests = [TextToVideo(prompt, size=size, schedule=schedule, cfg=CFG_SCALE) for prompt in PROMPTS]
        return predicted(dit), [replace(pipeline, dit=dit)(request) for request in requests]

    expected, expected_videos = outputs(paths[BASE])
    results: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        output, videos = outputs(path)
        results[name] = {
            **harness.difference(output, expected),
            "psnr_db": [psnr(video, reference) for video, reference in zip(videos, expected_videos)],
        }
    return results


def predicted(dit: AsymmDiT) -> torch.Tensor:
    """One forward for two prompts; the parity tests of the formats give the same inputs."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, TINY.dit.latent_channels, 2, 8, 8, generator=generator)
    features = torch.randn(2, TEXT_SLOTS, TINY.dit.text_feature_dim, generator=generator)
    mask = torch.arange(TEXT_SLOTS)[None] < torch.tensor([[9], [14]])
    return dit(latents, torch.tensor([0.7, 0.3]), features, mask)


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float | None:
    """In dB, of values from 0 to 1; None when the videos are the same."""
    error = (video.double() - reference.double()).square().mean().item()
    return -10 * math.log10(error) if error else None


# The whole


def print_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    header = ("MB", "/ bf16", "load s", "forward s", "/ bf16", "unpack /", "weights off", "output off", "PSNR dB")
    print(f"\n{'':<12}" + "".join(f"{title:>12}" for title in header))
    for name, row in results.items():
        cells = [f"{row['file_bytes'] / 1e6:.1f}", f"{row['file_to_bf16']:.3f}", f"{row['load']['median_s']:.3f}"]
        cells += [f"{row['forward']['median_s']:.3f}", f"{row['forward']['ratio_to_bf16']:.3f}"]
        cells += [f"{row['dequantize']['ratio_to_bf16']:.3f}" if row["dequantize"] else ""]
        if row["error"]:
            videos = "/".join("same" if value is None else f"{value:.1f}" for value in row["error"]["psnr_db"])
            cells += [f"{row['weights_relative_rms']:.1e}", f"{row['error']['relative_rms']:.1e}", videos]
        print(f"{name:<12}" + "".join(f"{cell:>12}" for cell in cells))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, help=f"{BASE} is always among them")
    parser.add_argument("--depth", type=int, help="what is not given here and below is the device's default")
    parser.add_argument("--visual-dim", type=int)
    parser.add_argument("--text-dim", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--text-features", type=int, dest="text_feature_dim", help="width of the text features")
    parser.add_argument("--latents", type=harness.size, help="latent frames x rows x columns")
    parser.add_argument("--text-tokens", type=int, default=64, help=f"valid ones of {TEXT_SLOTS}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--frames", type=int, default=13, help="of the embedded checkpoint's videos")
    parser.add_argument("--steps", type=int, default=20, help="of the embedded checkpoint's videos")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/quant.json, or quant-cuda.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try --device cpu")
    options.output = options.output or harness.RESULTS / f"quant{'-cuda' if options.device == 'cuda' else ''}.json"
    return options


def available(formats: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The formats that can be made here, the base first, and why the others cannot."""
    wanted = [BASE, *(format for format in formats if format != BASE)]
    try:
        import gguf  # noqa: F401
    except ImportError:
        skipped = {format: "the gguf package is not installed" for format in wanted if format not in CONVERTED}
        return [format for format in wanted if format not in skipped], skipped
    return wanted, {}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    device, defaults = torch.device(options.device), DEFAULTS[options.device]
    names = ("depth", "visual_dim", "text_dim", "heads", "text_feature_dim")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config, latents = replace(defaults.config, **given), options.latents or defaults.latents
    case = Case(config, latents, options.text_tokens, TEXT_SLOTS, COMPUTE, options.threads)
    formats, skipped = available(options.formats)

    with tempfile.TemporaryDirectory() as name:
        random, tiny = (Path(name) / part for part in ("random", "tiny"))
        random.mkdir()
        tiny.mkdir()
        write_file(random / "source.safetensors", config, torch.bfloat16)
        paths = written(formats, random / "source.safetensors", random)
        results = speeds(paths, case, device, options.rounds)
        found = errors(
            written([f for f in formats if f not in RANDOM_GGUF], TINY_DIT, tiny), options.frames, options.steps
        )
    results = {name: {**row, "error": found.get(name)} for name, row in results.items()}
    print_results(results)
    harness.print_skipped(skipped)
    harness.write_json(
        options.output,
        {
            "benchmark": "quant",
            "environment": {**harness.environment(), **hardware(device)},
            "settings": {
                "config": asdict(config),
                "latents": latents,
                "text_tokens": options.text_tokens,
                "text_slots": TEXT_SLOTS,
                "compute": str(COMPUTE),
                "rounds": options.rounds,
                "videos": {"prompts": PROMPTS, "frames": options.frames, "steps": options.steps, "cfg": CFG_SCALE},
            },
            "skipped": skipped,
            "results": results,
        },
    )
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    main()
