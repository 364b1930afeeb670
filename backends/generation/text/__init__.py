"""Prompts: the weights of their words, and what text encoders make of them."""
