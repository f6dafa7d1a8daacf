"""What the VAE holds while it works: our decoder against the peers', and ours at the released size against estimates.

    python benchmarks/vae_memory.py [--dtype float32 bfloat16] [--latent-frames 3 7 13 28] [--rounds 3] ...

First a medium decoder really decodes on the CPU, each contender in a fresh process: the most bytes that tensors it
made hold at once, and how much the process grew, which has in it what kernels take inside themselves. Both are beyond
the output frames: `ours stream` hands each piece on and forgets it, so that only the piece at hand counts; from the
others' peaks all their frames are taken off, whether or not they were there yet. Tiled decodes have tiles of half the
picture each way, with the peers' own shares of overlap; what they blend tiles in counts. They, and diffusers' framewise
decode (off by default there), make other pictures than the whole decode. Then `ours stream` and the peers' whole
decodes are timed in turns.

At the released size nothing is computed: the networks run on tensors of a CUDA device that have no memory, and what
they would hold there and on the host is counted, beside what `mochi_core.memory.vae_need` says. The video that goes in
counts nothing, frames that come out count as above. `values_per_pixel` are values for each pixel of one frame.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, peers, vae_decode
from benchmarks.live_bytes import LiveBytes
from benchmarks.vae_decode import Case
from mochi_core.config import MOCHI_1, TINY, VAEConfig
from mochi_core.memory import vae_need
from mochi_core.memory.frames import HostFrames
from mochi_core.shapes import LatentSize, VideoSize, frames_of
from mochi_core.vae import Decoder, Encoder
from mochi_core.vae.causal_conv import KeptContext

OURS = ("ours stream", "ours")
PEERS = {"diffusers": ("diffusers", "diffusers framewise", "diffusers tiled"), "native": ("native", "native tiled")}

FLAT = 1.10
SHARE_OF_PEER = 0.25
TIME_OF_PEER = 0.9

ENCODER_DTYPE = DECODER_DTYPE = torch.bfloat16
DEVICE = "cuda"

# The medium decoder


def decoded(name: str, model: Decoder) -> Callable[[torch.Tensor], int]:
    """A callable that decodes latents once and returns the bytes of all frames."""
    if name == "ours stream":
        return lambda latents: sum(piece.nbytes for piece in model.stream(latents))
    if name == "ours":
        return lambda latents: model(latents).nbytes
    config, state = model.config, model.state_dict()
    if name in PEERS["native"]:
        native = peers.native_decoder(config, state)
        decode = partial(peers.run_native_decoder_tiled, native) if name == "native tiled" else native
        return lambda latents: decode(latents).nbytes
    vae = peers.diffusers_vae(config, state)
    vae.use_framewise_decoding = name == "diffusers framewise"

    def decoded_by_diffusers(latents: torch.Tensor) -> int:
        if name == "diffusers tiled":
            vae.enable_tiling(**peers.diffusers_tiles(latents))
        return vae.decode(latents, return_dict=False)[0].nbytes

    return decoded_by_diffusers


@torch.inference_mode()
def held(name: str, case: Case) -> dict[str, int]:
    """What one decode holds, in a process of its own. What a first run sets up for good is not counted."""
    torch.set_num_threads(case.threads)
    run = decoded(name, case.model())
    latents = case.inputs()
    run(latents[:, :, :1, :2, :2])
    gc.collect()
    with harness.RssGrowth() as growth, LiveBytes() as live:
        frames = run(latents)
    apart = 0 if name == "ours stream" else frames
    return {
        "frames_bytes": frames,
        "live_bytes": live.peak - apart,
        "peak_rss_growth_bytes": growth.bytes - apart,
    }


def memory(case: Case, names: Sequence[str], skipped: dict[str, str]) -> dict[str, dict[str, int]]:
    """`held` of all contenders that are here."""
    found = {}
    for name in names:
        try:
            found[name] = harness.in_fresh_process(held, name, case)
        except peers.PeerUnavailable as reason:
            skipped[name] = str(reason)
    return found


@torch.inference_mode()
def times(case: Case, peer_names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Ours, streaming, against the peers' whole decodes; the ratio is to the fastest of them."""
    model, latents = case.model(), case.inputs()
    runs = {}
    for name in ("ours stream", *peer_names):
        try:
            runs[name] = vae_decode.contender(name, model, latents)
        except peers.PeerUnavailable:
            continue
    series = harness.time_in_turns(runs, rounds)
    medians = {name: statistics.median(values) for name, values in series.items()}
    fastest = min((name for name in runs if name != "ours stream"), key=medians.__getitem__, default=None)
    return {
        "latent_frames": case.latents[0],
        "median_s": medians,
        "times_s": series,
        "fastest_peer": fastest,
        "ratio_to_fastest_peer": harness.paired_ratio(series["ours stream"], series[fastest]) if fastest else None,
    }


def compare(case: Callable[[int], Case], options: argparse.Namespace) -> dict[str, Any]:
    """All of one dtype."""
    names = [*OURS, *(name for peer in options.peers for name in PEERS[peer])]
    skipped: dict[str, str] = {}
    by_length = {frames: memory(case(frames), names, skipped) for frames in options.latent_frames}
    measured = times(case(options.compare_at), options.peers, options.rounds)
    return {
        "memory": {str(frames): rows for frames, rows in by_length.items()},
        "times": measured,
        "claims": claims(by_length, measured, options.compare_at),
        "skipped": skipped,
    }


def claims(
    memory: Mapping[int, Mapping[str, Mapping[str, int]]], times: Mapping[str, Any], compare_at: int
) -> dict[str, dict[str, Any]]:
    """What we say of our streaming decoder, each with the figure that decides it."""
    shortest, longest = min(memory), max(memory)
    ours = {frames: rows["ours stream"]["live_bytes"] for frames, rows in memory.items()}
    growth = ours[longest] / ours[shortest]
    said = {
        f"live bytes grow by less than {FLAT - 1:.0%} from {shortest} to {longest} latent frames": (
            growth,
            growth < FLAT,
        )
    }
    untiled = [rows["live_bytes"] for name, rows in memory.get(compare_at, {}).items() if name in peers.NAMES]
    if untiled:
        share = ours[compare_at] / min(untiled)
        said[f"at {compare_at} latent frames at most {SHARE_OF_PEER:.0%} of the smallest peer's whole decode"] = (
            share,
            share <= SHARE_OF_PEER,
        )
    ratio = times["ratio_to_fastest_peer"]
    if ratio is not None:
        said[f"at {compare_at} latent frames at most {TIME_OF_PEER} of the time of the fastest peer's whole decode"] = (
            ratio,
            ratio <= TIME_OF_PEER,
        )
    return {name: {"value": value, "holds": holds} for name, (value, holds) in said.items()}


# The released size


@contextmanager
def without_memory() -> Iterator[None]:
    with torch.inference_mode(), FakeTensorMode():
        yield


def counted(work: Callable[[], Any]) -> dict[str, int]:
    """The most that tensors made by `work` would hold at once, on the device and on the host."""
    with LiveBytes() as live:
        work()
    return {"device_bytes": live.peak_on[DEVICE], "host_bytes": live.peak_on["cpu"]}


def decode_released(config: VAEConfig, size: LatentSize, kept_on_device: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Our decoder: whole, streaming, and streaming with frames on the host."""
    with without_memory():
        decoder = Decoder(config, dtype=DECODER_DTYPE, device=DEVICE).eval()
        shape = (1, config.latent_channels, size.frames, size.height, size.width)
        latents = torch.zeros(shape, dtype=DECODER_DTYPE, device=DEVICE)

        def stream(context: KeptContext) -> None:
            for _ in decoder.stream(latents, context=context):
                pass

        frames_bytes = 3 * size.video.frames * size.video.height * size.video.width * DECODER_DTYPE.itemsize
        whole = counted(lambda: decoder(latents))
        yield {"form": "whole", **whole, "device_bytes": whole["device_bytes"] - frames_bytes}
        yield {
            "form": "streaming",
            **counted(lambda: stream(KeptContext())),
            "estimated_device_bytes": vae_need.streaming_decode_bytes(config, size, dtype=DECODER_DTYPE),
        }
        for keep in kept_on_device:
            frames = HostFrames(DEVICE, keep, synchronous=True)
            yield {
                "form": "streaming, frames on the host",
                "kept_on_device": keep,
                **counted(lambda: stream(KeptContext(frames))),  # noqa: B023 - called at once
                "estimated_device_bytes": vae_need.streaming_decode_bytes(
                    config, size, dtype=DECODER_DTYPE, frames_on_host=True, kept_on_device=keep
                ),
                "estimated_host_bytes": vae_need.kept_frames_bytes(config, size, dtype=DECODER_DTYPE),
            }


def decode_released_by_peers(config: VAEConfig, size: LatentSize, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The peers' decoders that are here and can have this architecture."""
    for name in names:
        try:
            decoded(name, Decoder(config, device="meta"))  # what is imported must not be imported without memory
        except peers.PeerUnavailable:
            continue
        with without_memory():
            shape = (1, config.latent_channels, size.frames, size.height, size.width)
            latents = torch.zeros(shape, dtype=DECODER_DTYPE, device=DEVICE)
            decode = decoded(name, Decoder(config, dtype=DECODER_DTYPE, device=DEVICE).eval())
            frames_bytes = 0

            def work() -> None:
                nonlocal frames_bytes
                frames_bytes = decode(latents)  # noqa: B023 - called at once

            place = "host_bytes" if name == "native tiled" else "device_bytes"
            row = {"form": name, **counted(work)}
            row[place] -= frames_bytes
            yield row


def encode_released(config: VAEConfig, size: LatentSize) -> Iterator[dict[str, Any]]:
    """Our encoder: whole, and stage by stage with the video on the host."""
    with without_memory():
        encoder = Encoder(config, dtype=ENCODER_DTYPE, device=DEVICE).eval()
        shape = (1, 3, size.video.frames, size.video.height, size.video.width)
        video = torch.zeros(shape)
        there = video.to(DEVICE)
        yield {"form": "whole", **counted(lambda: encoder(there, ENCODER_DTYPE))}
        yield {
            "form": "stagewise",
            **counted(lambda: encoder.stagewise(video, ENCODER_DTYPE, device=DEVICE)),
            "estimated_device_bytes": vae_need.stagewise_encode_bytes(config, size, dtype=ENCODER_DTYPE),
            "estimated_host_bytes": vae_need.stagewise_encode_host_bytes(config, size, dtype=ENCODER_DTYPE),
        }


def released(
    config: VAEConfig, size: LatentSize, kept_on_device: Sequence[int], peer_names: Sequence[str]
) -> list[dict[str, Any]]:
    """One length of the released size."""
    pixels = size.video.height * size.video.width
    rows = [{"what": "decode", **row} for row in decode_released(config, size, kept_on_device)]
    names = [name for peer in peer_names for name in PEERS[peer]]
    rows += [{"what": "decode", **row} for row in decode_released_by_peers(config, size, names)]
    rows += [{"what": "encode", **row} for row in encode_released(config, size)]
    for row in rows:
        row["latent_frames"] = size.frames
        row["values_per_pixel"] = round(row["device_bytes"] / DECODER_DTYPE.itemsize / pixels)
    return rows


# Reports


def print_memory(title: str, result: Mapping[str, Any]) -> None:
    """One dtype of the medium decoder; beyond the output frames."""
    print(f"\n{title}: live MB (growth of the process)")
    lengths = list(result["memory"])
    print(f"  {'latent frames':<22}{''.join(f'{frames:>18}' for frames in lengths)}")
    for name in next(iter(result["memory"].values())):
        cells = [result["memory"][frames][name] for frames in lengths]
        shown = [f"{row['live_bytes'] / 1e6:.1f} ({row['peak_rss_growth_bytes'] / 1e6:.0f})" for row in cells]
        print(f"  {name:<22}{''.join(f'{cell:>18}' for cell in shown)}")
    for name, seconds in result["times"]["median_s"].items():
        print(f"  {name}, {result['times']['latent_frames']} latent frames: {seconds:.3f} s")
    for claim, row in result["claims"].items():
        print(f"  claim: {claim}: {row['value']:.3f} {str(row['holds']).lower()}")
    harness.print_skipped(result["skipped"])


def print_released(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        kept = f", {row['kept_on_device'] / 1e6:.0f} MB kept" if "kept_on_device" in row else ""
        places = []
        for place in ("device", "host"):
            estimate = row.get(f"estimated_{place}_bytes")
            beside = "" if estimate is None else f" (estimated {estimate / 1e6:,.0f})"
            places.append(f"{place} {row[f'{place}_bytes'] / 1e6:,.0f} MB{beside}")
        print(f"  {row['what']} {row['form']}{kept}, {row['latent_frames']} latent frames: {', '.join(places)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    vae_decode.add_decoder(parser)
    parser.add_argument("--latent-frames", type=int, nargs="+", default=(3, 7, 13, 28))
    parser.add_argument("--compare-at", type=int, default=13, help="latent frames of the claims against peers")
    parser.add_argument("--dtype", nargs="*", choices=harness.DTYPES, default=list(harness.DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", choices=("released", "tiny"), default="released", help="of the full size")
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--released-latent-frames", type=int, nargs="*", default=(4, 9, 28))
    parser.add_argument("--kept-on-device", type=float, nargs="*", default=(0, 1), help="GB of frames, beside the host")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "vae_memory.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    medium = vae_decode.decoder_of(options)
    results = {}
    for name in options.dtype:

        def case(frames: int, dtype: torch.dtype = harness.DTYPES[name]) -> Case:
            return Case(medium, (frames, options.rows, options.rows), dtype, options.threads)

        results[name] = compare(case, options)
        print_memory(f"Decoder, {name}", results[name])
    config = MOCHI_1.vae if options.config == "released" else TINY.vae
    kept = [round(gigabytes * 1e9) for gigabytes in options.kept_on_device]
    full_size = []
    print(f"\n{options.width} x {options.height}, {options.config}")
    for latent_frames in options.released_latent_frames:
        size = VideoSize(options.width, options.height, frames_of(latent_frames)).latent
        rows = released(config, size, kept, options.peers)
        print_released(rows)
        full_size += rows
    harness.write_json(
        options.output,
        {
            "benchmark": "vae_memory",
            "environment": harness.environment(),
            "peers": peers.versions(),
            "settings": {
                "decoder": asdict(medium.decoder),
                "latent_frames": options.latent_frames,
                "rows": options.rows,
                "rounds": options.rounds,
                "released": {"config": asdict(config), "width": options.width, "height": options.height},
            },
            "counted": "bytes of tensors beyond the weights and beyond the output frames; see the script",
            "results": results,
            "released": full_size,
        },
    )
    print(f"\nwrote {options.output}")


if __name__ == "__main__":
    main()
