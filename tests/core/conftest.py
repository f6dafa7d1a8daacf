"""What tests of the networks share: watching whether they run, and where their layers come from."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

LAYERS = ("Linear", "Conv2d", "Conv3d", "GroupNorm", "RMSNorm")


@pytest.fixture
def layer_runs():
    """`layer_runs(network)`: a counter of the network's layers that run from now on."""
    handles = []

    def watch(network):
        runs = Counter()

        def count(layer, *_):
            runs[type(layer).__name__] += 1

        for layer in network.modules():
            if not list(layer.children()):
                handles.append(layer.register_forward_pre_hook(count))
        return runs

    yield watch
    for handle in handles:
        handle.remove()


@pytest.fixture
def marked_operations():
    """A namespace like `torch.nn` whose layers carry `is_marked`."""
    return SimpleNamespace(**{name: type(name, (getattr(nn, name),), {"is_marked": True}) for name in LAYERS})


@pytest.fixture
def layers_with_weights():
    """`layers_with_weights(network)`: the layers that own a parameter, by name."""

    def find(network):
        return {name: layer for name, layer in network.named_modules() if list(layer.parameters(recurse=False))}

    return find


@pytest.fixture
def lies_in_file():
    """`lies_in_file(tensor, path)`: whether the tensor's memory is the mapped file itself (Linux)."""

    def check(tensor, path):
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return line.endswith(str(path.resolve()))
        return False

    return check


@pytest.fixture
def randomised():
    """`randomised(network)`: the network with small random weights, always the same."""

    def fill(network):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return network.eval().requires_grad_(False)

    return fill
