"""What waits, what is kept, and who is next. Imports no torch."""
