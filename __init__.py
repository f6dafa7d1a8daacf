"""Mochi Video for ComfyUI: see README.md. This file is the entry that ComfyUI imports; there is nothing else in it."""

from ._bootstrap import register_core

register_core()

from .nodes import comfy_entrypoint  # noqa: E402

__all__ = ["comfy_entrypoint"]
