"""The demo model: captioned shapes, the training that produced demo/checkpoint, and its
evaluation.
"""
