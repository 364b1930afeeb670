"""The HTTP side and the loop that every rank runs."""
