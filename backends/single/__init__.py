"""Plain diffusers on one device: the reference that every parallel method must match."""
