"""The causal video VAE: the decoder (latents to frames) and the encoder (frames to a posterior)."""

from .decoder import Decoder
from .encoder import Encoder, Posterior

__all__ = ["Decoder", "Encoder", "Posterior"]
