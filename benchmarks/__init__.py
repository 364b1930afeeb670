"""Measurements of speed and closeness, as ratios within one run. Never part of the tests."""
