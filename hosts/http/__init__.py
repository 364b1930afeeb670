"""Flask: who may ask, in which dialect, and what is answered. Imports no torch."""

VERSION = "0.1.0"
