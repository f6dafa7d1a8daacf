"""The asymmetric diffusion transformer (AsymmDiT)."""

from .model import AsymmDiT

__all__ = ["AsymmDiT"]
