"""What weight files contain, read from headers and configurations. Imports no torch."""
