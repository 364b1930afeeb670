"""Running a loaded pipeline."""
