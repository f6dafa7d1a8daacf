"""Damaged weight files by the thousand: none may end the process, hang it, or make it take memory it has no use for.

Whatever is wrong with a file, the library must say so with a `MochiError`, and a model that was loaded before must
still give the same numbers. Each file goes through all that loads weights, in a process that is watched:

    python tests/fuzz/fuzz_headers.py --count 10000 --seed 0

The same seed gives the same files. Those that fail are kept, and tried again with `--replay`. Linux only.
"""

# ruff: noqa: T201
import argparse
import collections
import contextlib
import faulthandler
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch

from mochi_core.errors import MochiError
from mochi_core.weights import build, formats, layouts
from mochi_core.weights.checkpoint import Checkpoint
from mochi_core.weights.lora_file import read_lora
from mochi_core.weights.quantized import QuantizedLinear

# What a file may take. The seeds are some 100 KB large and take milliseconds.
SECONDS = 20
MEMORY = 48 * 2**20
MEMORY_OF_SIZE = 2
# How far the address space may grow, whether it is used or not: past that, allocations fail.
ADDRESS_SPACE = 4 * 2**30

# How often a kind of seed is drawn.
SHARES = {"safetensors": 0.5, "gguf": 0.27, "folder": 0.12, "archive": 0.11}

WHOLE = "whole"
KEPT = Path(__file__).parent.parent.parent / "output" / "fuzz"


@dataclass(frozen=True)
class Outcome:
    """What became of a file: `loaded` (by one loader at least), `refused` (by all), or how it failed."""

    kind: str
    detail: str = ""
    seconds: float = 0.0
    memory: int = 0

    @property
    def failed(self) -> bool:
        return self.kind not in ("loaded", "refused")


# In the watched process


def serve(connection: Connection, model: Path, log: Path) -> None:
    """Tries each path that comes, and sends back its outcome, until None comes."""
    with log.open("w") as file:
        # Messages of crashes come from below Python.
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.enable()
        warnings.simplefilter("ignore")
        logging.disable()
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        witness = Witness(model)
        attempt(model, witness)  # what is imported and allocated once
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + ADDRESS_SPACE, hard))
        connection.send(None)
        while (path := connection.recv()) is not None:
            connection.send(measured(Path(path), witness))


class Witness:
    """A model that was loaded before, and what it gave then."""

    def __init__(self, path: Path):
        self.network, _ = build.load_dit(path, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        config = self.network.config
        self.inputs = (
            torch.randn(1, config.latent_channels, 1, 4, 4, generator=generator),
            torch.tensor([0.5]),
            torch.randn(1, 3, config.text_feature_dim, generator=generator),
            torch.ones(1, 3),
        )
        self.expected = self.output()

    def output(self) -> torch.Tensor:
        with torch.no_grad():
            return self.network(*self.inputs)


def measured(path: Path, witness: Witness) -> Outcome:
    with contextlib.suppress(OSError):  # where it is not allowed, only a new peak counts
        Path("/proc/self/clear_refs").write_text("5")  # takes the peak back to what is in use
    before, start = _memory("VmHWM"), time.perf_counter()
    try:
        loaded = attempt(path, witness)
        kind, detail = ("loaded" if loaded else "refused"), " ".join(loaded)
    except Exception as error:
        kind, detail = f"raised {type(error).__name__}", traceback.format_exc()
    seconds, memory = time.perf_counter() - start, _memory("VmHWM") - before
    size = sum(file.stat().st_size for file in (path.parent if path.is_file() else path).rglob("*") if file.is_file())
    if memory > MEMORY + MEMORY_OF_SIZE * size and not kind.startswith("raised"):
        kind, detail = "took memory", f"{memory >> 20} MiB"
    elif not torch.equal(witness.output(), witness.expected):
        kind = "changed another model"
    return Outcome(kind, detail, seconds, memory)


def attempt(path: Path, witness: Witness) -> list[str]:
    """Everything that reads weights, on one file. Returns what could load it; anything but `MochiError` is raised."""
    loaded = []
    loaders: dict[str, Callable[[Path], Any]] = {
        "tensors": read_tensors,
        "dit": lambda path: use(build.load_dit(path)[0]),
        "dit in floats": lambda path: build.load_dit(path, keep_quantized=False),
        "vae": build.load_vae,
        "t5": lambda path: use(build.load_t5(path)),
        "lora": lambda path: read_lora(path, witness.network),
    }
    for name, load in loaders.items():
        try:
            load(path)
        except MochiError as error:
            _check_message(error, path)
        else:
            loaded += [name] if name != "tensors" else []
    return loaded


def read_tensors(path: Path) -> None:
    """The parts of a file, and its tensors as floats, whether they fit a model or not."""
    checkpoint = Checkpoint(path)
    for part in layouts.PARTS:
        with contextlib.suppress(MochiError):
            layouts.read(checkpoint, layouts.find(checkpoint, part))
    for name in checkpoint.names[:8] + checkpoint.names[-8:]:
        with contextlib.suppress(MochiError):
            weight = checkpoint.tensor(name)
            if formats.is_quantized(weight):
                formats.plain(weight, torch.bfloat16)


def use(network: torch.nn.Module) -> None:
    """What the quantised layers do at each use."""
    for layer in network.modules():
        if isinstance(layer, QuantizedLinear):
            layer.dequantized(torch.bfloat16)


def _check_message(error: MochiError, path: Path) -> None:
    if not (error.value and error.rule and error.remedy and str(error)):
        raise AssertionError("an error without a message") from error
    cause: BaseException | None = error
    while cause is not None:
        # Whoever has more memory would have got it. torch's unpickler asks for whatever an archive names, and leaves it
        # unused: of archives, only the memory that was used counts.
        asked = isinstance(cause, MemoryError) or "can't allocate memory" in str(cause)
        if asked and path.suffix != ".pt":
            raise AssertionError("memory was asked for that is not there") from error
        cause = cause.__cause__ or cause.__context__


def _memory(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not tell {what}")


# Outside


class Watched:
    """The process that files are tried in; a new one takes the place of one that died or hung."""

    def __init__(self, folder: Path):
        self.model, self.log = folder / "model.safetensors", folder / "log"
        self.process: Any = None

    def run(self, path: Path) -> Outcome:
        if self.process is None:
            self._start()
        start = time.perf_counter()
        self.connection.send(str(path))
        try:
            if self.connection.poll(SECONDS):
                outcome = self.connection.recv()
                if outcome.failed and not outcome.kind.startswith("raised"):
                    self.stop()  # what it took or changed stays
                return outcome
            kind = "took too long"
            self.process.kill() if self._signal(signal.SIGABRT) else None
        except EOFError:
            kind = "ended the process"
        self.process.join()
        outcome = Outcome(
            f"{kind} ({self.process.exitcode})", self.log.read_text()[-5000:], time.perf_counter() - start
        )
        self.process = None
        return outcome

    def _signal(self, number: int) -> bool:
        """Asks the process to say where it is and end. Whether it did not."""
        os.kill(self.process.pid, number)
        self.process.join(5)
        return self.process.is_alive()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.model, self.log), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.connection.recv()
        except EOFError as error:
            raise RuntimeError(f"the watched process did not start:\n{self.log.read_text()}") from error

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(SECONDS)
            self.process.kill()
            self.process = None


def cases(all_seeds: Sequence[Any], seed: int, numbers: range) -> Iterator[tuple[str, dict[str, bytes], str]]:
    """First all seeds as they are, then damaged ones: a name, the files, and which of them is opened."""
    from mutations import mutated

    for one in all_seeds:
        yield f"{WHOLE} {one.name}", one.files, one.opened
    by_kind = {kind: [one for one in all_seeds if one.kind == kind] for kind in SHARES}
    for number in numbers:
        random = Random(f"{seed} {number}")
        chosen = random.choice(by_kind[random.choices([*SHARES], [*SHARES.values()])[0]])
        yield f"{seed}-{number}-{chosen.name}", mutated(chosen, random, all_seeds), chosen.opened


def write(files: dict[str, bytes], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def keep(folder: Path, opened: str, outcome: Outcome, kept: Path) -> Path:
    """Copies a failing input, and says beside it what happened."""
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept)
    (kept / "failure.txt").write_text(f"{kept / opened}\n{outcome.kind}\n\n{outcome.detail}\n")
    return kept / opened


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="how many damaged files to try")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop, however many were tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first file, to go on from there")
    parser.add_argument("--keep", type=Path, default=KEPT, help="where failing inputs go (%(default)s)")
    parser.add_argument("--replay", type=Path, nargs="+", help="try these paths instead")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        watched = Watched(Path(folder))
        try:
            return run(options, watched, Path(folder))
        finally:
            watched.stop()


def run(options: argparse.Namespace, watched: Watched, folder: Path) -> int:
    # Not above: the watched process, which imports this module too, has no use for them.
    from seeds import seeds

    all_seeds = seeds()
    model = next(one for one in all_seeds if one.name == "dit")  # the LoRAs among them are for it
    watched.model.write_bytes(model.files[model.opened])
    if options.replay:
        for path in options.replay:
            outcome = watched.run(path.resolve())
            print(f"{path}: {outcome.kind} {outcome.detail} ({outcome.seconds:.3f} s, {outcome.memory >> 10} KiB)")
        return 0

    start, counts, failures = time.perf_counter(), collections.Counter(), []
    slowest, largest = (0.0, ""), (0, "")
    for name, files, opened in cases(all_seeds, options.seed, range(options.first, options.first + options.count)):
        if time.perf_counter() - start > options.seconds:
            break
        case = folder / "case"
        write(files, case)
        outcome = watched.run(case / opened)
        whole = name.startswith(WHOLE)
        if whole and outcome.kind == "refused":
            outcome = Outcome("refused a whole file")
        slowest, largest = max(slowest, (outcome.seconds, name)), max(largest, (outcome.memory, name))
        if outcome.failed:
            failures.append(keep(case, opened, outcome, options.keep / name.replace(" ", "_")))
            print(f"{failures[-1]}: {outcome.kind}: {(outcome.detail.splitlines() or [''])[-1]}", flush=True)
        if not whole:
            counts["failed" if outcome.failed else outcome.kind] += 1
    seconds = time.perf_counter() - start
    print(
        f"{counts.total()} damaged files in {seconds:.0f} s: {counts['loaded']} loaded, {counts['refused']} refused, "
        f"{counts['failed']} failed"
    )
    print(f"slowest: {slowest[0]:.2f} s, {slowest[1]}; most memory: {largest[0] / 2**20:.1f} MiB, {largest[1]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
