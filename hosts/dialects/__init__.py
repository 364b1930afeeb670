"""Dialects of programs that speak other APIs: OpenAI's, and that of the A1111 web interface."""
