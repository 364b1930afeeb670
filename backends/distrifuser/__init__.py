"""Patch parallelism: every rank holds all weights and one band of the picture (DistriFusion, arXiv:2402.19481)."""
