"""What is done to a pipeline once, at load time."""
