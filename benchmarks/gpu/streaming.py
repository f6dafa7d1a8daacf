"""The released sizes in little memory, on a GPU: what streaming blocks, frames and tokens in parts costs and saves.

    python benchmarks/gpu/streaming.py [--frames 37 163] [--caps 6 8 12 16 24] [--limit-s 540] ...
    python benchmarks/gpu/streaming.py --device cpu --config tiny --width 64 --height 64 --frames 7 --rounds 1

Weights are random, made on the device and written to a temporary file, from which the streamed network is mapped; the
system has that file in memory, so `file` here is a file that was read before. In this order:

- pace: a guided step with so many resident blocks, in turns with one whose weights are all on the device;
- tokens: the same, all on the device, with so many tokens at once, in turns with all of them;
- trace: which share of the time of copies to the device kernels ran beside them, from one profiled step;
- decode: frames on the host in turns with frames on the device;
- caps: torch may have no more than so much of the device, whatever happens. A step and a decode as `memory.plan` plans
  them for that budget, and the step with no resident block; whether they ran, how long, and their peak.

A cap holds for torch's allocator. What the driver and CUDA's context take comes on top: `device_used_bytes` is all of
the device that is used at the end of a measurement, by whomever. What does not run is recorded with its reason, and the
JSON is rewritten after each measurement.
"""

import argparse
import copy
import dataclasses
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import harness
from benchmarks.gpu.full_size import CFG_SCALE, CONFIGS, SIGMA, prompts, random_decoder, random_latents, sizes
from benchmarks.gpu.overlap import events_of, overlap
from benchmarks.gpu.session import DTYPE, Facts, Session, default_output, free, hardware, on_device, timed
from mochi_core.dit import AsymmDiT
from mochi_core.memory import borrowing
from mochi_core.memory.blocks import device_bytes, streamed
from mochi_core.memory.copies import SideStream
from mochi_core.memory.frames import HostFrames
from mochi_core.memory.plan import Networks, Plan, decode_context, decode_plan, placed, plan
from mochi_core.sampling.guidance import Guidance
from mochi_core.shapes import LatentSize, VideoSize
from mochi_core.text.conditioning import TextConditioning
from mochi_core.vae import Decoder
from mochi_core.vae.causal_conv import KeptContext

SOURCES = ("pinned", "file")
SECTIONS = ("pace", "tokens", "trace", "decode", "caps")


class StreamingSession(Session):
    """A session whose records are this script's."""

    def attempt(self, facts: Facts, work: Callable[[], Facts]) -> None:
        """Records `facts` with what `work` measures; or why it cannot."""
        if self.over:
            self.record({**facts, "skipped": "time limit"})
            return
        try:
            measured = work()
        except torch.OutOfMemoryError:
            measured = {"ran": False, "error": "out of memory"}
        except Exception as error:  # the device is lent for minutes: the other measurements are worth having
            measured = {"ran": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        free(self.device)
        self.record({**facts, **measured})

    def save(self) -> None:
        harness.write_json(
            self.output,
            {
                "benchmark": "gpu_streaming",
                "environment": self.environment,
                "settings": {name: str(value) for name, value in vars(self.options).items() if name != "output"},
                "config": dataclasses.asdict(self.config),
                "records": self.records,
            },
        )


# The network


def write_weights(session: Session, path: Path) -> None:
    """Random weights of the DiT into a file: made on the device, one part at a time, so that any device will do."""
    model = AsymmDiT(session.config.dit, device="meta")
    parts = {name: part for name, part in model.named_children() if name != "blocks"}
    parts |= {f"blocks.{index}": block for index, block in enumerate(model.blocks)}
    state = {"pos_frequencies": torch.randn(model.pos_frequencies.shape).to(DTYPE)}
    for seed, (place, part) in enumerate(parts.items()):
        made = on_device(copy.deepcopy(part), session.device)
        harness.randomize(made, seed)
        state |= {f"{place}.{name}": tensor.cpu() for name, tensor in made.state_dict().items()}
    save_file(state, path)


def mapped(session: Session, path: Path) -> AsymmDiT:
    """The DiT over the file's bytes."""
    return filled(AsymmDiT(session.config.dit, device="meta"), load_file(path))


def filled(model: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """A model on the meta device with these tensors."""
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def host_decoder(session: Session) -> Decoder:
    """The decoder in host memory, with random weights made on the device."""
    state = {name: tensor.cpu() for name, tensor in random_decoder(session).state_dict().items()}
    return filled(Decoder(session.config.vae, device="meta"), state)


@contextmanager
def in_blocks(session: Session, model: AsymmDiT, resident: int, source: Any) -> Iterator[Any]:
    """The model streamed to the device; on a CPU too, where all of it lies there already."""
    copies = SideStream(session.device) if session.device.type == "cpu" else None
    blocks: Any = model.blocks
    with streamed(model, blocks, session.device, resident=resident, source=source, copies=copies) as traffic:
        yield traffic


@dataclasses.dataclass(frozen=True)
class Step:
    """The inputs of a guided step, on the device."""

    latents: torch.Tensor
    texts: tuple[TextConditioning, TextConditioning]

    @classmethod
    def random(cls, session: Session, size: LatentSize) -> "Step":
        return cls(random_latents(session, size, torch.float32), prompts(session))

    def with_(self, model: AsymmDiT) -> harness.Run:
        """One step of this model; the guided prediction."""

        def predict(latents: torch.Tensor, sigma: torch.Tensor, text: TextConditioning) -> torch.Tensor:
            return model(latents.to(DTYPE), sigma, text.features, text.mask)

        guidance = Guidance(predict, *self.texts, scales=(CFG_SCALE,))
        return lambda: guidance(self.latents, SIGMA, 0)


def in_turns(session: Session, **runs: harness.Run) -> tuple[Facts, dict[str, Any]]:
    """Medians of runs that take turns, and their last results. The second is related to the first."""
    results: dict[str, Any] = {}

    def synchronized(name: str) -> harness.Run:
        def run() -> None:
            results[name] = None  # two results at a time would count for the peak of the second
            results[name] = runs[name]()
            if session.device.type == "cuda":
                torch.cuda.synchronize(session.device)

        return run

    times = harness.time_in_turns({name: synchronized(name) for name in runs}, session.options.rounds)
    first, second = times.values()
    medians = {f"{name}_s": statistics.median(series) for name, series in times.items()}
    return {"ran": True, **medians, "ratio": harness.paired_ratio(second, first), "times_s": times}, results


# What is measured


def pace(session: StreamingSession, whole: AsymmDiT, waiting: AsymmDiT) -> None:
    """Steps with some blocks streamed, in turns with steps with all on the device."""
    options = session.options
    for size, source, resident in itertools.product(sizes(session), options.sources, options.resident):

        def work(size: VideoSize = size, source: str = source, resident: int = resident) -> Facts:
            step = Step.random(session, size.latent)
            with in_blocks(session, waiting, resident, source) as traffic:
                measured, results = in_turns(session, resident=step.with_(whole), streamed=step.with_(waiting))
            steps = options.rounds + 1
            return {
                **measured,
                "identical": torch.equal(results["resident"], results["streamed"]),
                "bytes_copied_a_step": traffic.bytes_copied // steps,
                "bytes_per_s": traffic.bytes_copied / steps / measured["streamed_s"],
            }

        facts = {"what": "pace", "source": source, "resident": resident, "frames": size.frames}
        session.attempt(facts, work)


def tokens(session: StreamingSession, whole: AsymmDiT) -> None:
    """Steps with some tokens at once, in turns with steps with all of them."""
    for size, at_once in itertools.product(sizes(session), session.options.tokens_at_once):

        def work(size: VideoSize = size, at_once: int = at_once) -> Facts:
            step = Step.random(session, size.latent)
            run = step.with_(whole)

            def in_chunks(tokens: int | None) -> Any:
                whole.tokens_at_once = tokens
                try:
                    return run()
                finally:
                    whole.tokens_at_once = None

            measured, results = in_turns(session, all=lambda: in_chunks(None), chunks=lambda: in_chunks(at_once))
            off = harness.difference(results["chunks"], results["all"])
            results.clear()
            peaks = {
                "all_peak": peak(session, lambda: in_chunks(None)),
                "chunks_peak": peak(session, lambda: in_chunks(at_once)),
            }
            return {**measured, "difference": off, **peaks}

        session.attempt({"what": "tokens", "tokens_at_once": at_once, "frames": size.frames}, work)


def peak(session: Session, run: harness.Run) -> Facts:
    """The memory of one run after another was warm."""
    free(session.device)
    return memory_of(timed(run, 1, session.device), session.device)


def memory_of(measured: Facts, device: torch.device) -> Facts:
    """The peaks since `timed` began."""
    facts = {name: measured[name] for name in ("peak_bytes", "resident_bytes")}
    if device.type == "cuda":
        unused, total = torch.cuda.mem_get_info(device)
        facts |= {
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
            "device_used_bytes": total - unused,
        }
    return facts


def decode(session: StreamingSession, decoder: Decoder) -> None:
    """Frames on the host in turns with frames on the device."""
    for size, kept in itertools.product(sizes(session), session.options.kept_on_device):

        def work(size: VideoSize = size, kept: float = kept) -> Facts:
            latents = random_latents(session, size.latent, DTYPE)

            def on_device() -> torch.Tensor:
                return frames_of(decoder, latents, KeptContext())

            def on_host() -> torch.Tensor:
                with closing(HostFrames(session.device, round(kept * 1e9))) as store:
                    return frames_of(decoder, latents, KeptContext(store))

            measured, results = in_turns(session, device=on_device, host=on_host)
            identical = torch.equal(results["device"], results["host"])
            peaks = {"device_peak": peak(session, on_device), "host_peak": peak(session, on_host)}
            return {**measured, "identical": identical, **peaks}

        session.attempt({"what": "decode", "kept_on_device": kept, "frames": size.frames}, work)


def frames_of(decoder: Decoder, latents: torch.Tensor, context: KeptContext) -> torch.Tensor:
    """All frames, on the CPU."""
    return torch.cat([piece.cpu() for piece in decoder.stream(latents, context=context)], dim=2)


# Under a cap


@contextmanager
def capped(device: torch.device, gigabytes: float) -> Iterator[None]:
    """Torch may have so much of the device and no more."""
    if device.type != "cuda":
        yield
        return
    free(device)
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def caps(session: StreamingSession, waiting: AsymmDiT) -> None:
    """Planned steps and decodes under each cap."""
    options = session.options
    networks = Networks.released(session.config, DTYPE)
    for cap, size in itertools.product(options.caps, sizes(session)[-1:]):
        facts: Facts = {"cap_gb": cap, "capped": session.device.type == "cuda", "frames": size.frames}

        def made(cap: float = cap, size: VideoSize = size) -> Plan:
            return plan(cap * 1e9, size, networks, session.device, text_tokens=options.text_tokens)

        for source, staying in itertools.product(options.sources, ("planned", "none")):

            def step(size: VideoSize = size, source: Any = source, staying: str = staying, cap: float = cap) -> Facts:
                how = dataclasses.replace(made().dit, source=source)
                if staying == "none":
                    weights = device_bytes(waiting, [*waiting.blocks], resident=0)
                    how = dataclasses.replace(how, resident=0, weights=weights)
                with capped(session.device, cap), placed(waiting, [*waiting.blocks], how, session.device):
                    measured = timed(Step.random(session, size.latent).with_(waiting), options.rounds, session.device)
                    measured |= memory_of(measured, session.device)
                planned = {"resident": how.resident, "tokens_at_once": how.tokens_at_once, "planned_bytes": how.peak}
                return {"ran": True, **planned, **measured}

            session.attempt({"what": "capped step", "source": source, "resident_blocks": staying, **facts}, step)
    decoder: Decoder | None = session.built({"what": "capped decode"}, host_decoder, session)
    if decoder is None:
        return
    free(session.device)
    for cap, size in itertools.product(options.decode_caps, sizes(session)[-1:]):
        for form in ("planned", "frames on the device", "frames on the host"):

            def run(size: VideoSize = size, form: str = form, cap: float = cap) -> Facts:
                return capped_decode(session, decoder, networks, size, form, cap)

            facts = {"cap_gb": cap, "capped": session.device.type == "cuda", "frames": size.frames}
            session.attempt({"what": "capped decode", "form": form, **facts}, run)


def capped_decode(
    session: Session, decoder: Decoder, networks: Networks, size: VideoSize, form: str, cap: float
) -> Facts:
    device = session.device
    planned: Facts = {}
    how = None
    if form == "planned":
        how = decode_plan(networks.decoder, size.latent, cap * 1e9, device)
        planned = {"planned": dataclasses.asdict(how), "planned_bytes": how.peak}

    @contextmanager
    def context() -> Iterator[KeptContext]:
        if form == "frames on the device":
            yield KeptContext()
        elif how is None:
            with closing(HostFrames(device)) as store:
                yield KeptContext(store)
        else:
            with decode_context(how, device) as planned_context:
                yield planned_context

    with capped(device, cap), borrowing.on_device(decoder, device):
        latents = random_latents(session, size.latent, DTYPE)

        def run() -> torch.Tensor:
            with context() as own:
                return frames_of(decoder, latents, own)

        measured = timed(run, session.options.rounds, device)
        measured |= memory_of(measured, device)
    return {"ran": True, **planned, **measured}


# The trace


def trace(session: StreamingSession, waiting: AsymmDiT) -> None:
    """One profiled step with the fewest resident blocks."""
    options = session.options
    resident = min(options.resident)
    for size, source in itertools.product(sizes(session), options.sources):
        facts: Facts = {"what": "trace", "source": source, "resident": resident, "frames": size.frames}
        if session.device.type != "cuda":
            session.record({**facts, "skipped": "a CPU has no copies beside its work"})
            continue

        def work(size: VideoSize = size, source: str = source) -> Facts:
            with in_blocks(session, waiting, resident, source):
                run = Step.random(session, size.latent).with_(waiting)
                run()
                return {"ran": True, **overlap(events_of(run, session.device))}

        session.attempt(facts, work)


# The whole


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--config", choices=CONFIGS, default="mochi_1")
    parser.add_argument("--depth", type=int, help="DiT blocks, when not the config's")
    parser.add_argument("--frames", type=int, nargs="+", default=(37, 163), help="caps are measured with the last")
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--text-tokens", type=int, default=64, help="valid tokens of the prompt")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES, help="where streamed weights wait")
    parser.add_argument("--resident", type=int, nargs="+", default=(0, 24, 40), help="blocks that stay on the device")
    parser.add_argument("--tokens-at-once", type=int, nargs="+", default=(1024, 4096, 16384))
    parser.add_argument("--kept-on-device", type=float, nargs="+", default=(0, 1), help="GB of the decoder's frames")
    parser.add_argument("--caps", type=float, nargs="+", default=(6, 8, 12, 16, 24), help="GB of 1e9 bytes")
    parser.add_argument("--decode-caps", type=float, nargs="+", default=(3, 6), help="GB of 1e9 bytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-s", type=float, help="start no measurement after this many seconds")
    parser.add_argument("--folder", type=Path, help="where the file of weights lies for a while: 20 GB")
    parser.add_argument("--output", type=Path, help="default: results/gpu-streaming-<device>-<date>.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try --device cpu --config tiny")
    return options


def measure(session: StreamingSession, waiting: AsymmDiT) -> None:
    """All sections that were asked for. Only two of them need the whole network on the device."""
    wanted = session.options.sections
    if not {"pace", "tokens"}.isdisjoint(wanted) and not session.over:
        whole = session.built({"what": "all weights on the device"}, on_device_whole, session, waiting)
        if whole is not None and "pace" in wanted:
            pace(session, whole, waiting)
        if whole is not None and "tokens" in wanted:
            tokens(session, whole)
        del whole
        free(session.device)
    if "trace" in wanted:
        trace(session, waiting)
    if "decode" in wanted:
        decoder = session.built({"what": "decode"}, random_decoder, session)
        if decoder is not None:
            decode(session, decoder)
        del decoder
        free(session.device)
    if "caps" in wanted:
        caps(session, waiting)


def on_device_whole(session: Session, waiting: AsymmDiT) -> AsymmDiT:
    state = {name: tensor.to(session.device, copy=True) for name, tensor in waiting.state_dict().items()}
    return filled(AsymmDiT(session.config.dit, device="meta"), state)


@torch.inference_mode()
def main() -> None:
    options = arguments()
    started, device = time.monotonic(), torch.device(options.device)
    config = CONFIGS[options.config]
    if options.depth is not None:
        config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, depth=options.depth))
    output = options.output or default_output(device, "streaming")
    deadline = math.inf if options.limit_s is None else started + options.limit_s
    environment = {
        **harness.environment(),
        **hardware(device),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }
    session = StreamingSession(options, config, output, deadline, environment)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="mochi-streaming-") as folder:
        path = Path(folder) / "dit.safetensors"
        write_weights(session, path)
        free(device)
        measure(session, mapped(session, path))
    session.save()
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
