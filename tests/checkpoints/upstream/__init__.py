"""Checkpoints made of the components of diffusers' own pipeline tests, which a checkout of that
library has and its package does not.
"""

from tests.checkpoints.upstream.suite import checkpoint, inputs, known

__all__ = ["checkpoint", "inputs", "known"]
