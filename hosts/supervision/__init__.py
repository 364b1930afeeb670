"""Processes that die, hang or are started again."""
