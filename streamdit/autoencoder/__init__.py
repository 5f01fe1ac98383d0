"""Video frames to latents and back: the contract, and autoencoders that fulfil it."""

from streamdit.autoencoder.base import Autoencoder, DecoderState, latent_statistics
from streamdit.autoencoder.causal import CausalAutoencoder, CausalAutoencoderConfig
from streamdit.autoencoder.io import load_autoencoder, save_autoencoder

__all__ = [
    "Autoencoder",
    "CausalAutoencoder",
    "CausalAutoencoderConfig",
    "DecoderState",
    "latent_statistics",
    "load_autoencoder",
    "save_autoencoder",
]
