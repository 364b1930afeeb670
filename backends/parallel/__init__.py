"""What all parallel methods share: groups of ranks, hooks, and ways to split a denoiser."""
