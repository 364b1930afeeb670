"""What every rank's main thread runs."""
