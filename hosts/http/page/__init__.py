"""The web page: one more client of the same routes."""
