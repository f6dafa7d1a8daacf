"""What tests of the kernels share: inputs, masks of every kind, and devices and packages that are not here."""

import sys
from types import ModuleType

import pytest
import torch

from mochi_core.attention import flash, kernels, nvidia, sage

# Full, valid first, anywhere, and one key at the end.
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0, 1, 1, 0, 1, 0, 0, 1, 0], [0] * 8 + [1]], dtype=torch.bool)


@pytest.fixture
def fresh_choices():
    """No choice of a kernel or package outlives the test, nor reaches it."""
    caches = (kernels._auto, flash.provider_for, sage.sageattn)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def pretend_capability(monkeypatch, fresh_choices):
    """`pretend_capability(9, 0)`: every device, this CPU too, is NVIDIA's and of this compute capability."""

    def pretend(*capability):
        monkeypatch.setattr(nvidia, "capability", lambda device: capability)

    return pretend


@pytest.fixture
def packages(monkeypatch, fresh_choices):
    """`packages(**{name: {attribute: value}})`: of all packages with a kernel, these alone are installed."""

    def install(**modules):
        for name in ("sageattention", *(provider.module for provider in flash.PROVIDERS.values())):
            monkeypatch.setitem(sys.modules, name, None)
        for name, attributes in modules.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.fixture
def inputs():
    """`inputs(dtype)`: q, k and v for `MASK`."""

    def make(dtype, width=16):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(*MASK.shape[:1], 3, 9, width, generator=generator).to(dtype) for _ in range(3)]

    return make


@pytest.fixture
def mask():
    return MASK
