"""xDiT: sequence, CFG, pipeline and data parallelism for diffusion transformers (Fang et al., arXiv:2411.01738)."""
