"""Patch parallelism: every rank holds all weights and one patch of the image (DistriFusion,
arXiv:2402.19481).
"""
