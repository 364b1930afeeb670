"""What a class gets that runs as diffusers has it, and what it refuses. Imports no torch."""
