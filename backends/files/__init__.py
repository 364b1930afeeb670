"""What files of weights are, read from headers and configurations. Imports no torch."""
