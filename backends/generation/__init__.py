"""One run of a loaded pipeline."""
