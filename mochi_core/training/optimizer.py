"""Which optimiser, and how its rate goes."""

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "muon")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class OptimizerOptions:
    """`rate` is the highest; `warmup` steps lead up to it, then `schedule` leads from it to `final_rate` times it.

    `hold` is the part of the steps after the warm-up that keep the highest rate. `muon` is for matrices alone, the
    rest goes by AdamW at `vector_rate`; its parameters named in `slow` (by how their names end) go at that part of it.
    """

    name: str = "adamw"
    rate: float = 2e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    schedule: str = "cosine"
    final_rate: float = 0.0
    hold: float = 0.0
    vector_rate: float = 2e-3
    slow: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (("name", self.name, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise TrainingError(f"optimizer.{name} is {value!r}", f"there are {', '.join(known)}", "Choose one")
        rules = {
            "rate": (0 < self.rate < math.inf, "above 0", "2e-4"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more", "0.01"),
            "betas": (
                len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                "two numbers below 1",
                "0.9, 0.999",
            ),
            "warmup": (self.warmup >= 0, "0 or more", "200"),
            "final_rate": (0 <= self.final_rate <= 1, "from 0 to 1", "0"),
            "hold": (0 <= self.hold <= 1, "from 0 to 1", "0"),
            "vector_rate": (0 < self.vector_rate < math.inf, "above 0", "2e-3"),
        }
        for name, (holds, rule, usual) in rules.items():
            if not holds:
                raise TrainingError(f"optimizer.{name} is {getattr(self, name)}", f"it must be {rule}", f"Use {usual}")

    def rate_at(self, step: int, steps: int) -> float:
        """By how much the rates of step `step` (from 0) of `steps` are multiplied."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        left = max(steps - self.warmup, 1)
        done = (step - self.warmup) / left
        falling = 0.0 if done < self.hold else (done - self.hold) / max(1 - self.hold, 1 / left)
        shape = {
            "cosine": 0.5 * (1 + math.cos(math.pi * min(falling, 1))),
            "linear": 1 - min(falling, 1),
            "constant": 1.0,
        }[self.schedule]
        return self.final_rate + (1 - self.final_rate) * shape


def check_installed(options: OptimizerOptions) -> None:
    """Raises `TrainingError` when the optimiser needs what is not installed."""
    if options.name == "muon":
        _muon()
    else:
        _adamw(options.name)


class Optimizer:
    """One or two of torch's optimisers over named parameters, as one."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], options: OptimizerOptions):
        self.options = options
        named = list(named)
        self.parts: list[torch.optim.Optimizer] = []
        # torch's Muon is for matrices.
        matrices = [(n, p) for n, p in named if p.ndim == 2] if options.name == "muon" else []
        if matrices:
            shaped = self._groups(matrices, options.rate)
            self.parts.append(_muon()(shaped, lr=options.rate, weight_decay=options.weight_decay))
        done = {name for name, _ in matrices}
        others = [(name, parameter) for name, parameter in named if name not in done]
        if others:
            rate = options.vector_rate if options.name == "muon" else options.rate
            settings = dict(lr=rate, betas=options.betas, weight_decay=options.weight_decay)
            self.parts.append(_adamw(options.name)(self._groups(others, rate), **settings))

    def _groups(self, named: list[tuple[str, nn.Parameter]], rate: float) -> list[dict[str, Any]]:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in named:
            factor = next((f for ending, f in self.options.slow.items() if name.endswith(ending)), 1.0)
            by_factor.setdefault(factor, []).append(parameter)
        return [{"params": held, "lr": rate * factor, "full_rate": rate * factor} for factor, held in by_factor.items()]

    def step(self, rate: float) -> None:
        """One step at `rate` times the full rates; the gradients are gone afterwards."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["full_rate"] * rate
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its state by name, for a snapshot: `<optimiser>.<parameter>.<what>`."""
        return {
            f"{index}.{parameter}.{what}": value
            for index, part in enumerate(self.parts)
            for parameter, state in part.state_dict()["state"].items()
            for what, value in state.items()
            if isinstance(value, torch.Tensor)
        }

    def numbers(self) -> dict[str, Any]:
        """The rest of its state: what is no tensor."""
        return {
            f"{index}.{parameter}.{what}": value
            for index, part in enumerate(self.parts)
            for parameter, state in part.state_dict()["state"].items()
            for what, value in state.items()
            if not isinstance(value, torch.Tensor)
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Goes on from what `tensors` and `numbers` gave."""
        for index, part in enumerate(self.parts):
            content = part.state_dict()
            state: dict[int, dict[str, Any]] = {}
            for name, value in (*tensors.items(), *numbers.items()):
                owner, parameter, what = name.split(".", 2)
                if int(owner) == index:
                    state.setdefault(int(parameter), {})[what] = value
            part.load_state_dict({**content, "state": state})


def _muon() -> Any:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise TrainingError(
            f"optimizer.name is 'muon' with torch {torch.__version__}", "it needs torch 2.9", "Use adamw"
        )
    return muon


def _adamw(name: str) -> Any:
    if name in ("adamw", "muon"):
        return torch.optim.AdamW
    try:
        library = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise TrainingError(
            f"optimizer.name is {name!r}", "it needs the package bitsandbytes", "pip install bitsandbytes, or use adamw"
        ) from error
    return library.PagedAdamW8bit if name.startswith("paged") else library.AdamW8bit
