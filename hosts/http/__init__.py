"""Flask: who may ask, in which dialect, and what is answered. Imports no torch."""
