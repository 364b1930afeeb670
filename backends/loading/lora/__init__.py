"""LoRAs of every trainer, and embeddings that come with them."""
