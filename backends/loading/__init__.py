"""What is done to a pipeline once, when it is loaded."""
