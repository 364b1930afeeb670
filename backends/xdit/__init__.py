"""xDiT: CFG, sequence (Ulysses, ring), pipeline (PipeFusion) and data parallelism for diffusion
transformers, and their hybrids.
"""
