"""The HTTP side and the loop that every rank runs."""

VERSION = "0.1.0"
