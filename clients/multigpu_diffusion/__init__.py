"""The folder that the ComfyUI and LocalAI clients look for beside themselves."""
