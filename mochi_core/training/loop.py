"""The loop: gradients of a task's loss, steps of an optimiser, and nothing lost whenever it ends.

run(task, LoopOptions(steps=2000), folder)

It knows neither networks nor clips: a LoRA, a whole network or a VAE are tasks. Several processes, as `accelerate
launch` starts them, each take other micro-batches and average their gradients.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import TrainingError
from .metrics import Metrics
from .optimizer import Optimizer, OptimizerOptions
from .signals import held_back
from .snapshot import Snapshot, check_same, newest, write_snapshot

log = logging.getLogger(__name__)

FINAL = "final"


@dataclass(frozen=True)
class Loss:
    """What a micro-batch gave: the loss to differentiate, whose clips it was, and more to write down."""

    value: torch.Tensor
    clips: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """What is learnt."""

    @property
    def trained(self) -> nn.Module:
        """Its parameters that require gradients are learnt, and kept in snapshots."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What must not change while a training lasts, as JSON can hold it."""
        ...

    def loss(self, index: int) -> Loss:
        """That of micro-batch `index`. Whatever is random comes from a seed and the index, never from a global."""
        ...

    def write(self, folder: Path, name: str) -> Path:
        """Writes the model as its users have it; the averaged parameters are in place if there are any."""
        ...

    def sample(self, folder: Path, name: str) -> Path | None:
        """Shows what the model makes, or None."""
        ...


@dataclass(frozen=True)
class LoopOptions:
    """`accumulation` micro-batches make a step. Gradients longer than `grad_clip` are shortened to it (0: never).

    `ema` is the average's decay (0: none). Every `save_every` steps there are a snapshot and the model's file, every
    `sample_every` steps a sample (0: at the end alone, and never). `keep` snapshots stay.
    """

    steps: int
    accumulation: int = 1
    grad_clip: float = 1.0
    ema: float = 0.0
    save_every: int = 200
    sample_every: int = 0
    keep: int = 2
    optimizer: OptimizerOptions = OptimizerOptions()
    tensorboard: bool = True

    def __post_init__(self) -> None:
        rules = {
            "steps": (self.steps >= 1, "1 or more", 2000),
            "accumulation": (self.accumulation >= 1, "1 or more", 1),
            "grad_clip": (0 <= self.grad_clip < math.inf, "0 (never) or more", 1.0),
            "ema": (0 <= self.ema < 1, "from 0 (none) to below 1", 0.999),
            "save_every": (self.save_every >= 0, "0 (at the end alone) or more", 200),
            "sample_every": (self.sample_every >= 0, "0 (never) or more", 200),
            "keep": (self.keep >= 1, "1 or more", 2),
        }
        for name, (holds, rule, usual) in rules.items():
            if not holds:
                raise TrainingError(f"{name} is {getattr(self, name)}", f"it must be {rule}", f"Use {usual}")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers."""
        return {
            "steps": self.steps,
            "accumulation": self.accumulation,
            "grad_clip": self.grad_clip,
            "ema": self.ema,
            "optimizer": asdict(self.optimizer),
        }


@dataclass(frozen=True)
class Step:
    """What a step did, for whoever watches. `sample` is the file of the sample that was just made."""

    step: int
    steps: int
    loss: float
    rate: float
    grad_norm: float
    seconds: float
    sample: Path | None = None


class Watch(Protocol):
    """Called after each step; cancels by raising whatever the caller understands."""

    def __call__(self, done: Step) -> None: ...


def unseen(done: Step) -> None:
    """The training nobody watches."""


def run(task: Task, options: LoopOptions, folder: str | Path, watch: Watch = unseen) -> Path:
    """Trains until `options.steps` are done, from the newest snapshot in `folder` on; returns the final model's file.

    However it ends, by itself, by an error, from the keyboard or by `watch`, the last good state is in a snapshot and
    in the file `final`. Ctrl-C never breaks an update or that saving off; several processes end after the same step.

    Raises `TrainingError` when the settings are not those that the folder's training began with, or when a loss or a
    gradient is not a number (which names the clips; the parameters are those before that step). `OSError` when the disk
    is full: the older snapshots are whole.
    """
    return _Run(task, options, Path(folder), watch).whole()


class _Run:
    def __init__(self, task: Task, options: LoopOptions, folder: Path, watch: Watch):
        from accelerate import Accelerator  # slow to import

        self.task, self.options, self.folder, self.watch = task, options, folder, watch
        # Whether there is a GPU is the task's business: its parameters lie where it trains.
        on_cpu = all(p.device.type == "cpu" for p in task.trained.parameters())
        self.accelerator = Accelerator(mixed_precision="no", cpu=on_cpu)
        self.named = [(name, p) for name, p in task.trained.named_parameters() if p.requires_grad]
        if not self.named:
            raise TrainingError("The task has no parameter to learn", "there must be one", "Unfreeze some")
        self.optimizer = Optimizer(self.named, options.optimizer)
        self.average = {name: p.detach().float().clone() for name, p in self.named} if options.ema else {}
        self.step = 0
        self.saved = -1
        # Whether an update was broken off: then the newest snapshot is the last good state.
        self.torn = False
        # Ctrl-C and SIGTERM that wait for the other processes.
        self.signals: list[int] = []
        self.fingerprint = {
            "loop": options.fingerprint,
            "processes": self.accelerator.num_processes,
            "task": dict(task.fingerprint),
        }

    def whole(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        metrics = Metrics(self.folder, self.step, self.options.tensorboard) if self._leads else None
        try:
            # Of several processes none can end alone: the others would wait for it.
            with held_back() if self.accelerator.num_processes > 1 else nullcontext([]) as self.signals:
                self._steps(metrics)
        except BaseException as error:
            # What was learnt is not lost, whatever happened; and what happened is what is said.
            with held_back():
                self._rescue(error)
            raise
        finally:
            if metrics is not None:
                metrics.close()
        with held_back():
            return self._end()

    def _steps(self, metrics: Metrics | None) -> None:
        while self.step < self.options.steps:
            done = self._step(metrics)
            if self._due(self.options.save_every):
                self._save()
                if self._leads:
                    with self._averaged():
                        self.task.write(self.folder, f"step_{self.step:06d}")
            if self._due(self.options.sample_every):
                done = replace(done, sample=self._sample())
            if self._leads:
                self.watch(done)

    def _rescue(self, error: BaseException) -> None:
        """Saves the last good state, where there is one that is not saved yet."""
        if self.torn:
            log.warning("Step %d was broken off by %r: the newest snapshot is what there is", self.step + 1, error)
        elif self.step:
            try:
                self._end()
            except Exception:
                log.exception("The training could not be saved after %r", error)

    def _step(self, metrics: Metrics | None) -> Step:
        started, options, accelerator = time.perf_counter(), self.options, self.accelerator
        total, clips, said = 0.0, [], {}
        for micro in range(options.accumulation):
            taken = (self.step * options.accumulation + micro) * accelerator.num_processes + accelerator.process_index
            loss = self.task.loss(taken)
            (loss.value / options.accumulation).backward()
            value = loss.value.item()
            total += value / options.accumulation
            clips += loss.clips if not math.isfinite(value) else ()
            for name, number in loss.metrics.items():
                said[name] = said.get(name, 0.0) + number / options.accumulation
        total, norm, ends = self._together(total, bool(self.signals))
        if not math.isfinite(total) or not math.isfinite(norm):
            self._forget_gradients()
            named = f"the clips are {', '.join(clips)}" if clips else "no clip of this process gave it alone"
            raise TrainingError(
                f"The loss of step {self.step + 1} is {total}, the length of its gradient {norm} ({named})",
                "both must be numbers",
                "Look at those clips; else use a lower rate, or bfloat16 in the place of float16",
            )
        rate = options.optimizer.rate_at(self.step, options.steps)
        with held_back():
            self._update(rate)
        done = Step(self.step, options.steps, total, rate * options.optimizer.rate, norm, time.perf_counter() - started)
        if metrics is not None:
            shown = {"loss": done.loss, "rate": done.rate, "grad_norm": norm, "seconds": round(done.seconds, 4)}
            metrics(self.step, shown | said)
        if ends:
            raise KeyboardInterrupt
        return done

    @torch.no_grad()
    def _update(self, rate: float) -> None:
        self.torn = True
        self.optimizer.step(rate)
        for name, parameter in self.named if self.average else ():
            self.average[name].lerp_(parameter.float(), 1 - self.options.ema)
        self.step += 1
        self.torn = False

    @torch.no_grad()
    def _together(self, loss: float, ends: bool) -> tuple[float, float, bool]:
        """The loss and the gradient's length over all processes, and whether one of them is to end.

        The gradients become their mean, and are clipped.
        """
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        if not gradients:
            raise TrainingError("The loss has no gradient", "it must depend on what is learnt", "Check the task")
        if self.accelerator.num_processes > 1:
            said = torch.tensor([loss, float(ends)], device=gradients[0].device)
            flat: Any = torch.cat([*(g.float().flatten() for g in gradients), said])
            flat = self.accelerator.reduce(flat, "mean")
            loss, ends = flat[-2].item(), flat[-1].item() > 0
            for gradient, part in zip(gradients, flat.split([*(g.numel() for g in gradients), 2])):
                gradient.copy_(part.view_as(gradient))
        norm = nn.utils.get_total_norm(gradients)
        if self.options.grad_clip and torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_([p for _, p in self.named], self.options.grad_clip, norm)
        return loss, norm.item(), ends

    def _forget_gradients(self) -> None:
        for _, parameter in self.named:
            parameter.grad = None

    # What is kept

    def _restore(self) -> None:
        found = newest(self.folder)
        if found is None:
            return
        check_same(found.fingerprint, self.fingerprint, self.folder)
        parameters = found.part("parameters")
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(parameters[name])
        average = found.part("average")
        self.average = {name: average[name].to(held) for name, held in self.average.items()}
        self.optimizer.restore(found.part("optimizer"), found.numbers)
        self.step = self.saved = found.step
        log.info("The training in %s goes on after step %s", self.folder, self.step)

    def _save(self) -> None:
        if not self._leads or self.saved == self.step:
            return
        tensors = {f"parameters/{name}": parameter for name, parameter in self.named}
        tensors |= {f"average/{name}": held for name, held in self.average.items()}
        tensors |= {f"optimizer/{name}": held for name, held in self.optimizer.tensors().items()}
        snapshot = Snapshot(self.step, tensors, self.optimizer.numbers(), self.fingerprint)
        write_snapshot(self.folder, snapshot, self.options.keep)
        self.saved = self.step

    def _end(self) -> Path:
        self._forget_gradients()
        self._save()
        if not self._leads:
            return self.folder
        with self._averaged():
            return self.task.write(self.folder, FINAL)

    def _sample(self) -> Path | None:
        if not self._leads:
            return None
        with self._averaged(), torch.no_grad():
            return self.task.sample(self.folder, f"step_{self.step:06d}")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged parameters in the place of the learnt ones, if there are any, as long as the block runs."""
        if not self.average:
            yield
            return
        learnt = {name: parameter.detach().clone() for name, parameter in self.named}
        try:
            with torch.no_grad():
                for name, parameter in self.named:
                    parameter.copy_(self.average[name])
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.named:
                    parameter.copy_(learnt[name])

    @property
    def _leads(self) -> bool:
        return self.accelerator.is_main_process

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0
