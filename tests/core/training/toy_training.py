"""A training small enough for a test, as a program that a test can kill: folder, steps, accumulation, save_every."""

import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[3]))

from mochi_core.training.draws import generator
from mochi_core.training.loop import LoopOptions, Loss, run
from mochi_core.training.optimizer import OptimizerOptions


class ToyTask:
    """Learns to turn vectors around."""

    def __init__(self, bad=(), pause=0.0, rate=1):
        self.trained = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        with torch.no_grad():
            for index, parameter in enumerate(self.trained.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator(3, index)) / 3)
        self.bad, self.pause, self.fingerprint, self.seen = bad, pause, {"data": {"rate": rate}}, []

    def loss(self, index):
        time.sleep(self.pause)
        self.seen.append(index)
        x = torch.randn(4, 6, generator=generator(5, index))
        value = (self.trained(x) - x.flip(1)).square().mean()
        return Loss(value * (float("nan") if index in self.bad else 1), (f"clip {index}",), {"index": float(index)})

    def write(self, folder, name):
        path = folder / f"{name}.safetensors"
        save_file({name: p.detach().clone() for name, p in self.trained.named_parameters()}, path)
        return path

    def sample(self, folder, name):
        path = folder / f"{name}.txt"
        path.write_text(repr(self.trained[0].weight.sum().item()))
        return path


def options(steps=30, **changed):
    optimizer = OptimizerOptions(rate=1e-2, warmup=3, schedule="cosine")
    return LoopOptions(**{**dict(steps=steps, save_every=5, accumulation=2, ema=0.9, optimizer=optimizer), **changed})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder, *numbers = sys.argv[1:]
    names = ("steps", "accumulation", "save_every")
    run(ToyTask(pause=0.01), options(**dict(zip(names, map(int, numbers)))), folder)
