"""The released sizes on a GPU, with random weights made there: seconds, memory, and the share of the device's peak.

    python benchmarks/gpu/full_size.py [--frames 25 37 85 163] [--peers diffusers native] [--limit-s 540] ...
    python benchmarks/gpu/full_size.py --device cpu --config tiny --width 64 --height 64 --frames 7 --repeats 1

In this order: the peak of big bf16 matrix products; for each frame count each attention kernel alone and a step with
classifier-free guidance (a prompt and the empty one; two forwards, or one of batch two); decoding, streamed and
whole; the T5 encoder; then the same of the peers, on the same weights. What does not run is recorded with its
reason. The JSON is rewritten after each measurement, so that a run that is cut short keeps what it had.
"""

import argparse
import dataclasses
import datetime
import gc
import math
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import harness, peers  # noqa: E402
from benchmarks.flops import attention_flops, dit_flops  # noqa: E402
from mochi_core.attention.joint import PlainJointAttention  # noqa: E402
from mochi_core.attention.kernels import KERNELS, get_kernel  # noqa: E402
from mochi_core.config import MOCHI_1, TINY, ModelConfig  # noqa: E402
from mochi_core.dit import AsymmDiT  # noqa: E402
from mochi_core.errors import MochiError  # noqa: E402
from mochi_core.sampling.guidance import Guidance  # noqa: E402
from mochi_core.shapes import LatentSize, VideoSize  # noqa: E402
from mochi_core.text.conditioning import TextConditioning  # noqa: E402
from mochi_core.text.t5 import empty_t5  # noqa: E402
from mochi_core.text.tokenizer import MAX_TOKENS  # noqa: E402
from mochi_core.vae import Decoder  # noqa: E402

CONFIGS = {"mochi_1": MOCHI_1, "tiny": TINY}
DTYPE = torch.bfloat16
CFG_SCALE = 6.0
SIGMA = 0.5
MATRIX_SIZES = {
    "cuda": ((8192, 8192, 8192), (16384, 16384, 16384), (44544, 3072, 9216), (44544, 8192, 3072)),
    "cpu": ((256, 256, 256), (512, 512, 512)),
}
MATRIX_PRODUCTS_AT_ONCE = 10
LARGEST_REFERENCE_SCORES = 4 << 30  # bytes, in float32

Facts = dict[str, Any]


@dataclass
class Session:
    """One run of this script: its options, its deadline, and what it has measured so far."""

    options: argparse.Namespace
    config: ModelConfig
    output: Path
    deadline: float
    environment: Facts
    records: list[Facts] = field(default_factory=list)
    peak_flops: float = math.nan

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def measure(self, facts: Facts, make: Callable[[], harness.Run], flops: int | None = None) -> None:
        """Times what `make()` returns after one warm-up call, and records that with `facts`; or why it cannot run."""
        if self.over:
            self.record({**facts, "skipped": "time limit"})
            return
        try:
            measured = timed(make(), self.options.repeats, self.device)
        except torch.OutOfMemoryError:
            measured = {"error": "out of memory"}
        except (RuntimeError, NotImplementedError, ImportError, MochiError, peers.PeerUnavailable) as error:
            measured = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        if flops and "seconds" in measured:
            rate = flops / measured["seconds"]
            measured |= {"flops": flops, "flops_per_s": rate, "of_matrix_peak": rate / self.peak_flops}
        self.record({**facts, **measured})
        free(self.device)

    def record(self, facts: Facts) -> None:
        """Adds one measurement, prints it and saves all."""
        self.records.append(facts)
        print("  ".join(f"{name}={_short(value)}" for name, value in facts.items() if name != "times_s"), flush=True)
        self.save()

    def save(self) -> None:
        harness.write_json(
            self.output,
            {
                "benchmark": "gpu_full_size",
                "environment": self.environment,
                "peers": peers.versions(),
                "settings": {name: value for name, value in vars(self.options).items() if name != "output"},
                "config": dataclasses.asdict(self.config),
                "matrix_peak_flops_per_s": None if math.isnan(self.peak_flops) else self.peak_flops,
                "records": self.records,
            },
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# The device


def hardware(device: torch.device) -> Facts:
    """The device and its software, for the record."""
    if device.type == "cpu":
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "device": properties.name,
        "device_memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(run: harness.Run, repeats: int, device: torch.device) -> Facts:
    """Seconds of each repeat after a warm-up, and the device's peak memory, with what was resident before."""
    cuda = device.type == "cuda"
    resident = torch.cuda.memory_allocated(device) if cuda else None
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def synchronized() -> None:
        run()
        if cuda:
            torch.cuda.synchronize(device)

    synchronized()
    times = [harness.seconds(synchronized) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    return {
        "seconds": statistics.median(times),
        "peak_bytes": peak,
        "resident_bytes": resident,
        "times_s": times,
    }


def on_device(model: nn.Module, device: torch.device) -> Any:
    """A model from the meta device, in bf16 with random weights."""
    model = model.to(DTYPE).to_empty(device=device)
    harness.randomize(model)
    return model


def built(session: Session, facts: Facts, build: Callable[[], Any]) -> Any | None:
    """What `build()` makes; None, and a record that says why, when it cannot be made."""
    try:
        return build()
    except torch.OutOfMemoryError:
        session.record({**facts, "error": "out of memory"})
    except peers.PeerUnavailable as reason:
        session.record({**facts, "error": str(reason)})
    free(session.device)
    return None


def matrix_peak(session: Session) -> None:
    """The fastest of a few big matrix products: what the shares of peak below refer to."""
    rates = []
    for rows, inner, columns in MATRIX_SIZES[session.device.type]:
        a = torch.randn(rows, inner, device=session.device, dtype=DTYPE)
        b = torch.randn(columns, inner, device=session.device, dtype=DTYPE)

        def products() -> None:
            for _ in range(MATRIX_PRODUCTS_AT_ONCE):
                a @ b.T

        flops = 2 * rows * inner * columns * MATRIX_PRODUCTS_AT_ONCE
        seconds = timed(products, session.options.repeats, session.device)["seconds"]
        rates.append(flops / seconds)
        session.record({"what": "matrix product", "size": [rows, inner, columns], "flops_per_s": flops / seconds})
    session.peak_flops = max(rates)
    free(session.device)


# What the networks are given


def sizes(session: Session) -> list[VideoSize]:
    options = session.options
    return [VideoSize(options.width, options.height, frames) for frames in options.frames]


def visual_tokens(session: Session, size: LatentSize) -> int:
    patch = session.config.dit.patch_size
    return size.frames * (size.height // patch) * (size.width // patch)


def random_latents(session: Session, size: LatentSize, dtype: torch.dtype) -> torch.Tensor:
    shape = (1, session.config.dit.latent_channels, size.frames, size.height, size.width)
    return torch.randn(shape, device=session.device, dtype=dtype)


def prompts(session: Session) -> tuple[TextConditioning, TextConditioning]:
    """A prompt of `--text-tokens` tokens, and the empty one."""
    width = session.config.dit.text_feature_dim
    features = torch.randn(1, MAX_TOKENS, width, device=session.device, dtype=DTYPE)
    mask = torch.arange(MAX_TOKENS, device=session.device)[None] < session.options.text_tokens
    return TextConditioning(features, mask), TextConditioning(torch.zeros_like(features), torch.zeros_like(mask))


def step_flops(session: Session, size: LatentSize) -> int:
    """A step with guidance: the prompt's forward and the empty one's."""
    tokens = visual_tokens(session, size)
    return sum(dit_flops(session.config.dit, tokens, text) for text in (session.options.text_tokens, 0))


def guided_step(
    session: Session, size: LatentSize, predict: Callable[..., torch.Tensor], batched: bool
) -> harness.Run:
    """One step with guidance, combined in float32 as the sampler does it."""
    guidance = Guidance(predict, *prompts(session), scales=(CFG_SCALE,), batched=batched)
    latents = random_latents(session, size, torch.float32)
    return lambda: guidance(latents, SIGMA, 0)


# Ours


def too_big_for(kernel: str, heads: int, tokens: int) -> bool:
    return kernel == "reference" and 4 * heads * tokens**2 > LARGEST_REFERENCE_SCORES


def measure_attention(session: Session) -> None:
    """Each kernel alone at the DiT's shapes, with and without a mask."""
    config = session.config.dit
    for size in sizes(session):
        tokens = visual_tokens(session, size.latent) + session.options.text_tokens
        for kernel in session.options.kernels:
            for masked in (False, True):
                facts: Facts = {"what": "attention", "kernel": kernel, "masked": masked, "frames": size.frames}
                if too_big_for(kernel, config.heads, tokens):
                    session.record({**facts, "skipped": "its scores would not fit"})
                    continue

                def make() -> harness.Run:
                    shape = (1, config.heads, tokens, config.head_dim)
                    q, k, v = (torch.randn(shape, device=session.device, dtype=DTYPE) for _ in range(3))
                    mask = torch.arange(tokens, device=session.device)[None] < tokens - 1 if masked else None
                    attend = get_kernel(kernel, session.device, DTYPE)
                    return lambda: attend(q, k, v, mask)

                session.measure(facts, make, attention_flops(config, tokens))


def measure_dit(session: Session) -> None:
    """Our guided step with each kernel, sequential and batched."""
    config = session.config.dit
    model = built(
        session,
        {"what": "guided step", "implementation": "ours"},
        lambda: on_device(AsymmDiT(config, device="meta"), session.device),
    )
    if model is None:
        return

    def predict(latents: torch.Tensor, sigma: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        return model(latents.to(DTYPE), sigma, text.features, text.mask)

    for size in sizes(session):
        tokens = visual_tokens(session, size.latent) + session.options.text_tokens
        for kernel in session.options.kernels:
            for block in model.blocks:
                block.attn.joint = PlainJointAttention(kernel=kernel)
            for batched in (False, True):
                facts = step_facts("ours", size, batched) | {"kernel": kernel}
                if too_big_for(kernel, config.heads * (1 + batched), tokens):
                    session.record({**facts, "skipped": "its scores would not fit"})
                    continue
                session.measure(
                    facts,
                    lambda: guided_step(session, size.latent, predict, batched),
                    step_flops(session, size.latent),
                )


def step_facts(implementation: str, size: VideoSize, batched: bool) -> Facts:
    return {
        "what": "guided step",
        "implementation": implementation,
        "form": "batched" if batched else "sequential",
        "frames": size.frames,
    }


def decode_facts(implementation: str, form: str, size: VideoSize) -> Facts:
    return {"what": "decode", "implementation": implementation, "form": form, "frames": size.frames}


def measure_decoder(session: Session) -> None:
    """Our decoder, streamed with each piece taken to the CPU, and whole."""
    decoder = built(
        session,
        {"what": "decode", "implementation": "ours"},
        lambda: on_device(Decoder(session.config.vae, device="meta"), session.device),
    )
    if decoder is None:
        return
    for size in sizes(session):
        latents = random_latents(session, size.latent, DTYPE)
        session.measure(
            decode_facts("ours", "streamed", size),
            lambda: lambda: [piece.cpu() for piece in decoder.stream(latents)],
        )
        session.measure(decode_facts("ours", "whole", size), lambda: lambda: decoder(latents).cpu())


def measure_t5(session: Session) -> None:
    """One prompt through the text encoder."""
    facts: Facts = {"what": "text encoding"}
    encoder = built(session, facts, lambda: on_device(empty_t5(session.config.text), session.device))
    if encoder is None:
        return
    encoder.tie_weights()
    ids = torch.randint(2, session.config.text.vocab_size, (1, MAX_TOKENS), device=session.device)
    mask = (torch.arange(MAX_TOKENS, device=session.device)[None] < session.options.text_tokens).long()
    session.measure(facts, lambda: lambda: encoder(input_ids=ids, attention_mask=mask))


# The peers


def measure_peer_dit(session: Session, name: str) -> None:
    """A peer's guided step on our weights. The native one cannot batch prompts of different length."""
    config = session.config.dit
    forms = (False, True) if name == "diffusers" else (False,)

    def build() -> Callable[[peers.DiTInputs], torch.Tensor]:
        state = on_device(AsymmDiT(config, device="meta"), session.device).state_dict()
        if name == "diffusers":
            diffusers = peers.diffusers_dit(config, state)
            return lambda inputs: peers.run_diffusers_dit(diffusers, inputs)
        native = peers.native_dit(config, state, session.device.type)
        return lambda inputs: -peers.run_native_dit(native, inputs)

    run = built(session, {"what": "guided step", "implementation": name}, build)
    if run is None:
        return

    def predict(latents: torch.Tensor, sigma: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        return run(peers.DiTInputs(latents.to(DTYPE), sigma, text.features, text.mask))

    for size in sizes(session):
        for batched in forms:
            session.measure(
                step_facts(name, size, batched),
                lambda: guided_step(session, size.latent, predict, batched),
                step_flops(session, size.latent),
            )


def measure_peer_decoder(session: Session, name: str) -> None:
    """A peer's decoder, whole, on our weights."""
    config = session.config.vae

    def build() -> Callable[[torch.Tensor], torch.Tensor]:
        state = on_device(Decoder(config, device="meta"), session.device).state_dict()
        if name == "diffusers":
            diffusers = peers.diffusers_decoder(config, state)
            return lambda latents: peers.run_diffusers_decoder(diffusers, config, latents)
        return peers.native_decoder(config, state, session.device.type)

    run = built(session, {"what": "decode", "implementation": name}, build)
    if run is None:
        return
    for size in sizes(session):
        latents = random_latents(session, size.latent, DTYPE)
        session.measure(decode_facts(name, "whole", size), lambda: lambda: run(latents).cpu())


# The whole


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(MATRIX_SIZES), default="cuda")
    parser.add_argument("--config", choices=CONFIGS, default="mochi_1")
    parser.add_argument("--depth", type=int, help="DiT blocks, when not the config's")
    parser.add_argument("--frames", type=int, nargs="+", default=(25, 37, 85, 163))
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--text-tokens", type=int, default=64, help=f"valid tokens of the prompt, of {MAX_TOKENS}")
    parser.add_argument("--kernels", nargs="+", choices=("auto", *KERNELS), default=tuple(KERNELS))
    parser.add_argument("--peers", nargs="*", choices=peers.NAMES, default=peers.NAMES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-s", type=float, help="start no measurement after this many seconds")
    parser.add_argument("--output", type=Path, help="default: results/gpu-<device>-<date>.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try --device cpu --config tiny")
    return options


def default_output(device: torch.device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", hardware(device)["device"].lower()).strip("-")
    return harness.RESULTS / f"gpu-{name}-{datetime.date.today().isoformat()}.json"


@torch.inference_mode()
def main() -> None:
    options = arguments()
    config = CONFIGS[options.config]
    if options.depth is not None:
        config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, depth=options.depth))
    output = options.output or default_output(torch.device(options.device))
    deadline = math.inf if options.limit_s is None else time.monotonic() + options.limit_s
    environment = {**harness.environment(), **hardware(torch.device(options.device))}
    session = Session(options, config, output, deadline, environment)
    matrix_peak(session)
    sections = [measure_attention, measure_dit, measure_decoder, measure_t5]
    for name in options.peers:
        sections += [lambda s, n=name: measure_peer_dit(s, n), lambda s, n=name: measure_peer_decoder(s, n)]
    for section in sections:
        if not session.over:
            section(session)
            free(session.device)
    session.save()
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
