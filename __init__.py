"""Mochi Video for ComfyUI: see README.md. This file is the entry that ComfyUI imports; there is nothing else in it."""

from ._bootstrap import register_core

register_core()

from .nodes import comfy_entrypoint  # noqa: E402

# What the host's page loads.
WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
