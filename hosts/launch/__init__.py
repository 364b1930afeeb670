"""From the command line to settings, and from settings to a plan for starting. Imports no torch."""
