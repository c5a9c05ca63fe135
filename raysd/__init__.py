"""raysd fine-tunes Stable Diffusion models on a Ray cluster and keeps every version in a registry."""

__version__ = "0.1.0"
