"""LoRA files of all trainers, and the embeddings bundled with them."""
