"""The floor under a forward: its matrix products, convolutions and attentions alone, nothing in between.

The model's own weights meet inputs of the shapes and strides that they meet in a real forward; one random tensor
serves all calls of a shape. No implementation with the same layout and the same torch can be faster than that.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.harness import Run
from mochi_core.attention.joint import QKV, JointAttention


class Floor:
    """Records the calls of one forward, then replays them.

    with floor.recording(model):
        forward()
    floor.replay()
    """

    def __init__(self) -> None:
        self._calls: list[Run] = []
        self._tensors: dict[tuple[Any, ...], torch.Tensor] = {}

    def recording(self, model: nn.Module) -> "_Recording":
        return _Recording(self, model)

    def replay(self) -> None:
        for call in self._calls:
            call()

    def add_layer(self, layer: nn.Module, x: torch.Tensor) -> None:
        self._calls.append(_functional(layer, self._like(x)))

    def add_attention(self, batch: int, heads: int, tokens: int, like: torch.Tensor) -> None:
        q, k, v = (self._tensor((batch, heads, tokens, like.shape[-1]), None, like, role) for role in "qkv")
        self._calls.append(lambda: F.scaled_dot_product_attention(q, k, v))

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        return self._tensor(tuple(x.shape), x.stride(), x)

    def _tensor(
        self, shape: tuple[int, ...], strides: tuple[int, ...] | None, like: torch.Tensor, role: str = ""
    ) -> torch.Tensor:
        key = (shape, strides, like.dtype, role)
        if key not in self._tensors:
            new = like.new_empty(shape) if strides is None else like.new_empty_strided(shape, strides)
            self._tensors[key] = new.normal_()
        return self._tensors[key]


class _Recording:
    def __init__(self, floor: Floor, model: nn.Module):
        self._floor, self._model = floor, model

    def __enter__(self) -> None:
        layers = [m for m in self._model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
        self._hooks = [layer.register_forward_hook(self._record_layer) for layer in layers]
        self._attentions: list[Any] = [m for m in self._model.modules() if hasattr(m, "joint")]
        for attention in self._attentions:
            attention.joint = _RecordingJoint(self._floor, attention.joint)

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        for attention in self._attentions:
            attention.joint = attention.joint.inner

    def _record_layer(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        self._floor.add_layer(layer, inputs[0])


class _RecordingJoint:
    """Joint attention that records its shape: both streams side by side, heads contiguous."""

    def __init__(self, floor: Floor, inner: JointAttention):
        self._floor, self.inner = floor, inner

    def __call__(self, visual: QKV, text: QKV, text_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        batch, tokens, heads, _ = visual.q.shape
        self._floor.add_attention(batch, heads, tokens + text.q.shape[1], visual.v)
        return self.inner(visual, text, text_mask)


def _functional(layer: Any, x: torch.Tensor) -> Run:
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, nn.Linear):
        return lambda: F.linear(x, weight, bias)
    convolve = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv3d
    return lambda: convolve(x, weight, bias, layer.stride, layer.padding)
