"""Step caches: what a step reuses of earlier ones."""
