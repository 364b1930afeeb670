"""DistriFuser: patch parallelism (Li et al., DistriFusion, CVPR 2024, arXiv:2402.19481)."""
