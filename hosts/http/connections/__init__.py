"""Connections on which no thread works: requests that arrive, and clients that read answers."""
