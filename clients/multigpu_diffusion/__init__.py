"""The folder that the ComfyUI and LocalAI clients expect beside themselves."""
