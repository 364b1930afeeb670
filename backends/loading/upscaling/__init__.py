"""Networks that enlarge images, given by path at launch (--upscalers)."""
