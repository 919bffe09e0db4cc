"""Model families, one a file: Stable Diffusion 3 and others. Outside of its file nothing names one.

Everywhere else a network answers the velocity v = e - x0 at a noise level sigma in [0, 1], for latents
[B, *latent], of an image [B, C, h, w], and a `Conditioning` of named tensors.
"""
