"""Mochi 1, Genmo's text-to-video model, as a library that needs torch alone to run its networks.

Start at `pipeline.MochiPipeline`; `docs/architecture.md` says where everything else is.
"""

__version__ = "0.1.0"
