"""AsyncDiff: consecutive segments of the denoiser on different ranks. Source: Chen et al., NeurIPS
2024, arXiv:2406.06911.
"""
