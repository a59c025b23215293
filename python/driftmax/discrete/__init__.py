"""Masked discrete diffusion: networks, losses, likelihoods, training, and the samplers."""
