"""How much one encoded field of a request may cost to decode."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """Upper bounds for one field; every one is a positive integer.

    The defaults admit what the clients send at the largest sizes the models make (a 4096 x 4096
    image or its latents, embeds of 512 tokens) with room to spare, and no more than a request body
    may hold.
    """

    max_encoded_bytes: int = 256 * 2**20
    """Characters of base64, or bytes of an image file."""
    max_pixels: int = 24 * 2**20
    """Width times height of one image. Decoding takes up to 20 bytes per pixel for a moment."""
    max_tensor_elements: int = 32 * 2**20
    """Elements of one tensor after its strides are applied."""
    max_depth: int = 32
    """Containers inside containers."""
    max_opcodes: int = 100_000
    """Pickle instructions; an image takes about 25, with a palette 800."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"DecodeLimits.{field.name}={value!r} is not allowed. Give a positive integer."
                )
