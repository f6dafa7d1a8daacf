"""What a LoRA's training needs: what recomputing parts of blocks and streaming them save, and what they cost in time.

    python benchmarks/training_memory.py [--frames 37 61 79 85] [--budgets 24 32 48 80] [--rounds 5] ...
    python benchmarks/training_memory.py --device cuda --frames 37 --budgets 24 [--rounds 3]

- steps: a small model, one forward and backward of its LoRA on this machine, in turns with different checkpoints and
  streamed blocks: seconds (ratios are of the processor's), whether the gradients are the same, and the bytes that are
  alive at the worst moment;
- full size: the released model, counted on tensors that have shapes and no memory: with genmo's own checkpoints of all
  blocks beside what they publish of one H100, and as `memory.training_plan` plans it for budgets;
- with `--device cuda`, instead of both: the full size with random weights, really run as planned, and its peak.

Counted is what tensors hold: frozen weights, the LoRA, its optimiser and the work. Published is what a GPU used.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.gpu.session import default_output, free, hardware
from benchmarks.live_bytes import LiveBytes
from benchmarks.streaming_plan import Case, without_memory
from mochi_core.config import MOCHI_1, TINY, DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.errors import MemoryBudgetError
from mochi_core.memory.blocks import streamed
from mochi_core.memory.copies import SideStream
from mochi_core.memory.training_need import QKV_AND_OUT, Checkpoints, lora_bytes, training_activations
from mochi_core.memory.training_plan import TrainingPlan, plan_training
from mochi_core.shapes import LatentSize, VideoSize
from mochi_core.training.checkpointing import checkpointed
from mochi_core.training.lora import LoraOptions, Rank, TrainableLora

ALL = 10**6
PARTS = Checkpoints(qkv=ALL, feed_forward=ALL, post_attention=ALL)
# The reference's fine-tuner, its README: rank 16, all three checkpoints of all 48 blocks, one H100. GB by frames.
PUBLISHED = {37: "50", 61: "64", 79: "69-78", 85: "80"}
# Where tensors without memory lie: autograd asks nothing of it, as it would of a GPU that is not here.
NOWHERE = "meta"


@dataclass(frozen=True)
class Training:
    """One forward and backward: the forward, what is recomputed, and how many blocks stay on the device (None: all)."""

    case: Case
    checkpoints: Checkpoints = Checkpoints()
    resident: int | None = None
    ranks: Mapping[str, int] = field(default_factory=lambda: QKV_AND_OUT)

    def lora(self, network: AsymmDiT) -> TrainableLora:
        groups = {name: Rank(self.ranks.get(name, 0)) for name in ("qkv", "out", "feed_forward", "modulation")}
        lora = TrainableLora(network, LoraOptions(**groups), device=self.case.device)
        for up in lora.up.values():
            torch.nn.init.normal_(up, std=0.02)  # zeros, as it begins, would leave half of the gradients zero
        return lora

    def need(self) -> int:
        """What `memory.training_need` says of it, the LoRA's gradients included."""
        case = self.case
        options: dict[str, Any] = dict(batch=case.batch, text_tokens=case.text_tokens, dtype=case.dtype)
        return training_activations(
            case.config, case.size, checkpoints=self.checkpoints, ranks=self.ranks, **options
        ) + self.optimizer_bytes(of=4)

    def optimizer_bytes(self, of: int = 16) -> int:
        """What the LoRA takes, of each parameter `of` bytes: 4 are its gradient, 16 all that AdamW holds."""
        return lora_bytes(self.case.config, self.ranks) // 16 * of

    @contextmanager
    def placed(self, network: AsymmDiT, copies: SideStream | None = None) -> Iterator[Any]:
        """The network on the device of the case as this training has it; gives its `run_block`."""
        with ExitStack() as stack:
            if self.resident is not None:
                blocks: Any = network.blocks
                stack.enter_context(streamed(network, blocks, self.case.device, resident=self.resident, copies=copies))
            yield stack.enter_context(checkpointed(network, self.checkpoints, resident=self.resident))


def step(network: AsymmDiT, inputs: tuple[torch.Tensor, ...], run_block: Any) -> None:
    """One forward and backward of a mean squared error in float32."""
    out = network(*inputs, run_block=run_block).float()
    (out - inputs[0].float()).square().mean().backward()


# Counting


class Fused(torch.autograd.Function):
    """What a fused attention kernel makes, and keeps for its gradients: no scores."""

    @staticmethod
    def forward(context: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sums, out = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device), torch.empty_like(q)
        context.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        *inputs, _, sums = context.saved_tensors
        beside = torch.empty_like(sums)
        gradients = tuple(map(torch.empty_like, inputs))
        del beside
        return gradients


@contextmanager
def nowhere() -> Iterator[None]:
    """As `without_memory`, with a backward too."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Any:
        return Fused.apply(q, k, v)

    with (
        without_memory(),
        mock.patch("mochi_core.attention.joint.get_kernel", lambda *_: attend),
        # `meta` has none; that of the CPU has nothing to wait for either.
        mock.patch("torch.get_device_module", lambda *_: torch.cpu),
    ):
        yield


def counted(training: Training) -> int:
    """The most bytes alive in a step, inputs and the LoRA's gradients included; weights only if blocks are streamed."""
    training = replace(training, case=replace(training.case, device=NOWHERE))
    with nowhere():
        return live_bytes(training)


def live_bytes(training: Training) -> int:
    """The same on tensors that are really there."""
    case = training.case
    network = case.model(case.device if training.resident is None else "cpu")
    lora = training.lora(network)
    with LiveBytes() as live, lora.attached(network):
        copies = None if training.resident is None else SideStream(case.device, synchronous=True)
        with training.placed(network, copies) as run_block:
            step(network, case.inputs(), run_block)
    return live.peak_on[torch.device(case.device).type]


# Steps of a small model


def ways(depth: int) -> dict[str, tuple[Checkpoints, int | None]]:
    """What is compared: checkpoints, and how many blocks stay."""
    whole = Checkpoints(blocks=ALL)
    return {
        "nothing recomputed": (Checkpoints(), None),
        "qkv": (Checkpoints(qkv=ALL), None),
        "feed-forward": (Checkpoints(feed_forward=ALL), None),
        "post-attention": (Checkpoints(post_attention=ALL), None),
        "all three": (PARTS, None),
        "whole blocks": (whole, None),
        "whole blocks, half streamed": (whole, depth // 2),
        "whole blocks, all streamed": (whole, 0),
    }


def steps(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """Steps of one network in turns, each way with its seconds, gradients and bytes."""
    torch.set_num_threads(threads)
    network = case.model("cpu")
    harness.randomize(network)
    trainings = {
        name: Training(case, checkpoints, resident) for name, (checkpoints, resident) in ways(case.config.depth).items()
    }
    lora = trainings["nothing recomputed"].lora(network)
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(
        x if x.dtype == torch.bool else torch.rand(x.shape, generator=generator).to(x.dtype) for x in case.inputs()
    )
    gradients: dict[str, list[torch.Tensor]] = {}

    def once(name: str) -> harness.Run:
        def run() -> None:
            lora.zero_grad()
            step(network, inputs, run_block[0])
            gradients[name] = [p.grad.clone() for p in lora.parameters() if p.grad is not None]

        run_block: list[Any] = []

        def placed() -> None:
            # What streaming sets up once for a training is not what a step takes.
            with trainings[name].placed(network, SideStream("cpu")) as given:
                run_block[:] = [given]
                processor = time.process_time()
                times[name].append(harness.seconds(run))
                processor_times[name].append(time.process_time() - processor)

        return placed

    times: dict[str, list[float]] = {name: [] for name in trainings}
    # What others do on the machine in the meantime is not in these.
    processor_times: dict[str, list[float]] = {name: [] for name in trainings}
    with lora.attached(network):
        harness.time_in_turns({name: once(name) for name in trainings}, rounds)
    for series in (*times.values(), *processor_times.values()):
        del series[0]  # the warm-up round
    first = next(iter(trainings))
    weights, rows = sum(p.nbytes for p in network.parameters()), {}
    for name, training in trainings.items():
        stays = training.resident is None
        rows[name] = {
            "median_s": statistics.median(times[name]),
            "median_processor_s": statistics.median(processor_times[name]),
            "ratio": harness.paired_ratio(processor_times[name], processor_times[first]),
            "times_s": times[name],
            "processor_times_s": processor_times[name],
            "identical_gradients": all(map(torch.equal, gradients[name], gradients[first])),
            # With the weights: a streamed count has those that are there.
            "counted_bytes": counted(training) + (weights if stays else 0),
            "estimated_bytes": training.need() + weights if stays else None,
            "really_counted_bytes": live_bytes(training) + weights if stays else None,
        }
    return {"weights_bytes": weights, "ways": rows}


# The full size


def full_size(case: Case, budgets: list[float], counted_budgets: list[float]) -> dict[str, Any]:
    """One size: as the reference does it, and as planned for budgets; some of them are counted too."""
    reference = Training(case, PARTS)
    network = AsymmDiT(case.config, dtype=case.dtype, device="meta").requires_grad_(False)
    weights = sum(p.nbytes for p in network.parameters())
    video = case.size.video
    row: dict[str, Any] = {
        "frames": video.frames,
        "reference": {
            "published_gb": PUBLISHED.get(video.frames),
            "weights_bytes": weights,
            "estimated_bytes": weights + reference.need() + reference.optimizer_bytes(of=12),
            "counted_bytes": weights + counted(reference) + reference.optimizer_bytes(of=12),
        },
        "budgets": [],
    }
    for budget in budgets:
        try:
            # Where streamed weights wait makes no difference to the device.
            made = plan_training(budget, video, network, text_tokens=case.text_tokens, host_bytes=0)
        except MemoryBudgetError as error:
            row["budgets"].append({"budget_bytes": budget, "error": str(error), "least_bytes": error.least})
            continue
        one = {"budget_bytes": budget, "plan": str(made).splitlines(), "estimated_bytes": made.peak} | facts(made)
        if budget in counted_budgets:
            training = Training(case, made.checkpoints, made.resident)
            # The streamed count has the weights; gradients are in both.
            peak = counted(training) + training.optimizer_bytes(of=12)
            one |= {"counted_bytes": peak, "fits": peak <= budget}
        row["budgets"].append(one)
    return row


def facts(made: TrainingPlan) -> dict[str, Any]:
    return {
        "resident": made.resident,
        "checkpoints": asdict(made.checkpoints),
        "weights_bytes": made.weights,
        "activations_bytes": made.activations,
        "lora_bytes": made.lora,
        "streamed_bytes": made.streamed_bytes,
    }


# A real device


def on_device(case: Case, budgets: list[float], rounds: int) -> list[dict[str, Any]]:
    """Steps with AdamW as planned for budgets, and as the reference does it; what does not run says why."""
    device, network = torch.device(case.device), random_network(case)
    reference = Training(case, PARTS, case.config.depth)
    runs: list[tuple[dict[str, Any], Callable[[], Training]]] = [({"what": "reference"}, lambda: reference)]
    for budget in budgets:

        def planned(budget: float = budget) -> Training:
            made = plan_training(budget, case.size.video, network, device, text_tokens=case.text_tokens)
            print(made)
            return Training(case, made.checkpoints, made.resident)

        runs.append(({"what": "planned", "budget_bytes": budget}, planned))
    records = []
    for about, make in runs:
        try:
            measured = measured_steps(make(), network, rounds)
        except (torch.OutOfMemoryError, MemoryBudgetError) as error:
            measured = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        free(device)
        records.append({"frames": case.size.video.frames, **about, **measured})
        print(records[-1])
    return records


def measured_steps(training: Training, network: AsymmDiT, rounds: int) -> dict[str, Any]:
    """Seconds of whole steps after a first one, and the most that torch's allocator held."""
    device = torch.device(training.case.device)
    cuda: Any = torch.cuda if device.type == "cuda" else None
    if cuda:
        cuda.reset_peak_memory_stats(device)
    lora = training.lora(network)
    optimizer, inputs = torch.optim.AdamW(lora.parameters(), lr=1e-4), training.case.inputs()
    copies = SideStream(device) if device.type == "cpu" else None
    with lora.attached(network), training.placed(network, copies) as run_block:

        def run() -> None:
            step(network, inputs, run_block)
            optimizer.step()
            optimizer.zero_grad()
            if cuda:
                cuda.synchronize(device)

        run()
        times = [harness.seconds(run) for _ in range(rounds)]
    return {
        "resident": training.resident,
        "checkpoints": asdict(training.checkpoints),
        "seconds": statistics.median(times),
        "times_s": times,
        "peak_bytes": cuda.max_memory_allocated(device) if cuda else None,
    }


def random_network(case: Case) -> AsymmDiT:
    """Random weights in host memory, made on the device one part at a time."""
    network = AsymmDiT(case.config, dtype=case.dtype, device="meta")
    network.pos_frequencies = torch.nn.Parameter(torch.randn(network.pos_frequencies.shape).to(case.dtype))
    parts = [part for name, part in network.named_children() if name != "blocks"]
    for seed, part in enumerate([*parts, *network.blocks]):
        part.to_empty(device=case.device)
        harness.randomize(part, seed)
        part.to("cpu")
    return network.requires_grad_(False).eval()


def report(result: Mapping[str, Any]) -> None:
    """The result in a few lines."""
    for dtype, found in result.get("steps", {}).items():
        print(f"{dtype}: weights {found['weights_bytes'] / 1e6:.0f} MB")
        for name, row in found["ways"].items():
            same = "same gradients" if row["identical_gradients"] else "OTHER GRADIENTS"
            seconds = f"{row['median_processor_s']:8.3f} s  x{row['ratio']:.3f}"
            print(f"  {name:<30}{seconds}{row['counted_bytes'] / 1e6:9.1f} MB, {same}")
    for row in result.get("full_size", ()):
        said = {name: value and f"{value / 1e9:.1f} GB" for name, value in row["reference"].items() if "bytes" in name}
        print(f"{row['frames']} frames, reference: published {row['reference']['published_gb']} GB, {said}")
        for one in row["budgets"]:
            print(one["error"] if "error" in one else "\n".join(one["plan"]))
            with contextlib.suppress(KeyError):
                print(f"  counted {one['counted_bytes'] / 1e9:.2f} GB: {'fits' if one['fits'] else 'DOES NOT FIT'}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where the full size really runs, when it is not the CPU")
    parser.add_argument("--really", action="store_true", help="run the full size really on a CPU too")
    parser.add_argument("--config", choices=("released", "tiny"), default="released")
    parser.add_argument("--width", type=int, default=848)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, nargs="*", default=(37, 61, 79, 85))
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--budgets", nargs="*", type=float, default=[24, 32, 48, 80], help="GB, of 1e9 bytes")
    parser.add_argument(
        "--counted-budgets", nargs="*", type=float, default=[24], help="those whose plans are counted too"
    )
    parser.add_argument("--small", type=int, nargs=4, default=(8, 8, 256, 128), metavar=("DEPTH", "HEADS", "X", "Y"))
    parser.add_argument("--small-latents", type=harness.size, default=(4, 32, 32), help="of the small model")
    parser.add_argument("--dtype", nargs="*", choices=harness.DTYPES, default=list(harness.DTYPES), help="there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/training_memory.json, of a GPU with its name")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try --really --config tiny")
    return options


def main() -> None:
    options = arguments()
    config = (MOCHI_1 if options.config == "released" else TINY).dit
    budgets = [budget * 1e9 for budget in options.budgets]
    sizes = [VideoSize(options.width, options.height, frames).latent for frames in options.frames]
    cases = [Case(config, size, torch.bfloat16, options.text_tokens, device=options.device) for size in sizes]
    really = options.really or options.device != "cpu"
    device = torch.device(options.device)
    usual = default_output(device, "training") if really else harness.RESULTS / "training_memory.json"
    output = options.output or usual
    result: dict[str, Any] = {
        "benchmark": "training_memory",
        "environment": harness.environment() | (hardware(device) if really else {}),
        "settings": {"config": asdict(config), "text_tokens": options.text_tokens, "ranks": dict(QKV_AND_OUT)},
    }
    if really:
        result["device"] = [record for case in cases for record in on_device(case, budgets, options.rounds)]
    else:
        depth, heads, visual, text = options.small
        small = DiTConfig(depth=depth, heads=heads, visual_dim=visual, text_dim=text, text_feature_dim=1024)
        case = Case(small, LatentSize(*options.small_latents), torch.float32, text_tokens=64, device="cpu")
        result["settings"] |= {"small_config": asdict(small), "small_latents": options.small_latents}
        result |= {"rounds": options.rounds, "steps": {}, "full_size": []}
        for name in options.dtype:
            result["steps"][name] = steps(replace(case, dtype=harness.DTYPES[name]), options.rounds, options.threads)
            harness.write_json(output, result)
        counted_budgets = [budget * 1e9 for budget in options.counted_budgets]
        for case in cases:
            result["full_size"].append(full_size(case, budgets, counted_budgets))
            harness.write_json(output, result)
    report(result)
    harness.write_json(output, result)
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
