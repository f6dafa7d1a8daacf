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
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import harness, peers
from benchmarks.gpu.session import DTYPE, Facts, Session, default_output, free, hardware, on_device
from mochi_core.attention.joint import PlainJointAttention
from mochi_core.attention.kernels import KERNELS, get_kernel
from mochi_core.config import MOCHI_1, TINY
from mochi_core.dit import AsymmDiT
from mochi_core.dit.flops import attention_flops, dit_flops
from mochi_core.sampling.guidance import Guidance
from mochi_core.shapes import LatentSize, VideoSize
from mochi_core.text.conditioning import TextConditioning
from mochi_core.text.t5 import empty_t5
from mochi_core.text.tokenizer import MAX_TOKENS
from mochi_core.vae import Decoder

CONFIGS = {"mochi_1": MOCHI_1, "tiny": TINY}
CFG_SCALE = 6.0
SIGMA = 0.5
MATRIX_SIZES = {
    "cuda": ((8192, 8192, 8192), (16384, 16384, 16384), (44544, 3072, 9216), (44544, 8192, 3072)),
    "cpu": ((256, 256, 256), (512, 512, 512)),
}
MATRIX_PRODUCTS_AT_ONCE = 10
LARGEST_REFERENCE_SCORES = 4 << 30  # bytes, in float32


def matrix_peak(session: Session) -> None:
    """The fastest of a few big matrix products: what the shares of peak below refer to."""
    for rows, inner, columns in MATRIX_SIZES[session.device.type]:
        flops = 2 * rows * inner * columns * MATRIX_PRODUCTS_AT_ONCE
        facts: Facts = {"what": "matrix products", "size": [rows, inner, columns]}
        session.measure(facts, matrix_products, session.device, rows, inner, columns, flops=flops)
    session.peak_flops = max(record.get("flops_per_s", 0) for record in session.records) or None


def matrix_products(device: torch.device, rows: int, inner: int, columns: int) -> harness.Run:
    a = torch.randn(rows, inner, device=device, dtype=DTYPE)
    b = torch.randn(columns, inner, device=device, dtype=DTYPE)

    def run() -> None:
        for _ in range(MATRIX_PRODUCTS_AT_ONCE):
            torch.mm(a, b.T)

    return run


# What the networks are given


def sizes(session: Session) -> list[VideoSize]:
    options = session.options
    return [VideoSize(options.width, options.height, frames) for frames in options.frames]


def kernels(session: Session) -> list[str]:
    return list(session.options.kernels)


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


def guided_step(session: Session, size: LatentSize, predict: Callable[..., torch.Tensor], batched: bool) -> harness.Run:
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
    for size, kernel, masked in itertools.product(sizes(session), kernels(session), (False, True)):
        tokens = visual_tokens(session, size.latent) + session.options.text_tokens
        facts: Facts = {"what": "attention", "kernel": kernel, "masked": masked, "frames": size.frames}
        if too_big_for(kernel, config.heads, tokens):
            session.record({**facts, "skipped": "its scores would not fit"})
            continue
        flops = attention_flops(config, tokens)
        session.measure(facts, attention, session, kernel, tokens, masked, flops=flops)


def attention(session: Session, kernel: str, tokens: int, masked: bool) -> harness.Run:
    """One kernel on random tensors; the mask hides the last key."""
    shape = (1, session.config.dit.heads, tokens, session.config.dit.head_dim)
    q, k, v = (torch.randn(shape, device=session.device, dtype=DTYPE) for _ in range(3))
    mask = torch.arange(tokens, device=session.device)[None] < tokens - 1 if masked else None
    attend = get_kernel(kernel, session.device, DTYPE)
    return lambda: attend(q, k, v, mask)


def measure_dit(session: Session) -> None:
    """Our guided step with each kernel, sequential and batched."""
    config = session.config.dit
    model = session.built({"what": "guided step", "implementation": "ours"}, random_dit, session)
    if model is None:
        return

    def predict(latents: torch.Tensor, sigma: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        return model(latents.to(DTYPE), sigma, text.features, text.mask)

    for size, kernel, batched in itertools.product(sizes(session), kernels(session), (False, True)):
        facts = step_facts("ours", size, batched) | {"kernel": kernel}
        tokens = visual_tokens(session, size.latent) + session.options.text_tokens
        if too_big_for(kernel, config.heads * (1 + batched), tokens):
            session.record({**facts, "skipped": "its scores would not fit"})
            continue
        for block in model.blocks:
            block.attn.joint = PlainJointAttention(kernel=kernel)
        flops = step_flops(session, size.latent)
        session.measure(facts, guided_step, session, size.latent, predict, batched, flops=flops)


def random_dit(session: Session) -> AsymmDiT:
    return on_device(AsymmDiT(session.config.dit, device="meta"), session.device)


def random_decoder(session: Session) -> Decoder:
    return on_device(Decoder(session.config.vae, device="meta"), session.device)


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
    decoder = session.built({"what": "decode", "implementation": "ours"}, random_decoder, session)
    if decoder is None:
        return
    for size in sizes(session):
        latents = random_latents(session, size.latent, DTYPE)
        session.measure(decode_facts("ours", "streamed", size), streamed, decoder, latents)
        session.measure(decode_facts("ours", "whole", size), whole, decoder, latents)


def streamed(decoder: Decoder, latents: torch.Tensor) -> harness.Run:
    return lambda: [piece.cpu() for piece in decoder.stream(latents)]


def whole(decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor) -> harness.Run:
    return lambda: decode(latents).cpu()


def measure_t5(session: Session) -> None:
    """One prompt through the text encoder."""
    facts: Facts = {"what": "text encoding"}
    encoder = session.built(facts, random_t5, session)
    if encoder is None:
        return
    ids = torch.randint(2, session.config.text.vocab_size, (1, MAX_TOKENS), device=session.device)
    mask = (torch.arange(MAX_TOKENS, device=session.device)[None] < session.options.text_tokens).long()
    session.measure(facts, lambda: lambda: encoder(input_ids=ids, attention_mask=mask))


def random_t5(session: Session) -> nn.Module:
    encoder = on_device(empty_t5(session.config.text), session.device)
    encoder.tie_weights()
    return encoder


# The peers


def measure_peer_dit(session: Session, name: str) -> None:
    """A peer's guided step on our weights. The native one cannot batch prompts of different length."""
    run = session.built({"what": "guided step", "implementation": name}, peer_dit, session, name)
    if run is None:
        return

    def predict(latents: torch.Tensor, sigma: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        return run(peers.DiTInputs(latents.to(DTYPE), sigma, text.features, text.mask))

    forms = (False, True) if name == "diffusers" else (False,)
    for size, batched in itertools.product(sizes(session), forms):
        flops = step_flops(session, size.latent)
        session.measure(
            step_facts(name, size, batched), guided_step, session, size.latent, predict, batched, flops=flops
        )


def peer_dit(session: Session, name: str) -> Callable[[peers.DiTInputs], torch.Tensor]:
    config, state = session.config.dit, random_dit(session).state_dict()
    if name == "diffusers":
        diffusers = peers.diffusers_dit(config, state)
        return lambda inputs: peers.run_diffusers_dit(diffusers, inputs)
    native = peers.native_dit(config, state, session.device.type)
    return lambda inputs: -peers.run_native_dit(native, inputs)


def measure_peer_decoder(session: Session, name: str) -> None:
    """A peer's decoder, whole, on our weights."""
    decode = session.built({"what": "decode", "implementation": name}, peer_decoder, session, name)
    if decode is None:
        return
    for size in sizes(session):
        latents = random_latents(session, size.latent, DTYPE)
        session.measure(decode_facts(name, "whole", size), whole, decode, latents)


def peer_decoder(session: Session, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    config, state = session.config.vae, random_decoder(session).state_dict()
    if name == "diffusers":
        diffusers = peers.diffusers_decoder(config, state)
        return lambda latents: peers.run_diffusers_decoder(diffusers, config, latents)
    return peers.native_decoder(config, state, session.device.type)


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
    sections: list[Callable[[Session], None]] = [measure_attention, measure_dit, measure_decoder, measure_t5]
    for name in options.peers:
        sections += [functools.partial(measure, name=name) for measure in (measure_peer_dit, measure_peer_decoder)]
    for section in sections:
        if not session.over:
            section(session)
            free(session.device)
    session.save()
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
