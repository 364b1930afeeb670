"""Models by their names on a hub: which files are needed, where they are, and how they get here."""
