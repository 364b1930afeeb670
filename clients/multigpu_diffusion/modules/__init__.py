"""Modules that the ComfyUI nodes import."""
