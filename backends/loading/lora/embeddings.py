"""Textual inversion: learned vectors for a word of the prompt, in separate files or beside a LoRA.

The word is the file's name, or the token that the file names. Each vector gets a private-use
Unicode character, which the tokenizer reads as one token, and prompts get these characters in place
of the word. So any word works, and no other code that reads prompts needs to know. While no
embedding is active, the text encoders keep their original modules.
"""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from torch import Tensor, nn

from backends.errors import ConfigError

FIRST_CHARACTER = 0xE000
"""Start of Unicode's private use area: one character per active vector."""

_BUNDLED = re.compile(
    r"bundle_emb\.(?P<word>.+)\.(?P<part>string_to_param\.\*|emb_params|clip_l|clip_g|t5xxl|t5)"
)
_ENCODERS: Mapping[str, Sequence[str]] = {
    "clip_l": ("text_encoder",),
    "clip_g": ("text_encoder_2",),
    "t5": ("text_encoder_3", "text_encoder_2"),
    "t5xxl": ("text_encoder_3", "text_encoder_2"),
}
Words = dict[str, dict[str, Tensor]]
"""Word -> part of the file (an encoder's short name, or `any`) -> vectors (n, D)."""


def split_embeddings(content: Mapping[str, Any], stem: str) -> tuple[Words, dict[str, Any]]:
    """Return the embeddings of a file, and the rest of it."""
    if isinstance(content.get("string_to_param"), Mapping):
        return {stem: {"any": _rows(next(iter(content["string_to_param"].values())))}}, {}
    words: Words = {}
    rest = {}
    for key, value in content.items():
        bundled = _BUNDLED.fullmatch(key)
        if (
            isinstance(value, Tensor)
            and value.dim()
            and (bundled or key in ("emb_params", *_ENCODERS))
        ):
            word, part = (bundled["word"], bundled["part"]) if bundled else (stem, key)
            words.setdefault(word, {})[part if part in _ENCODERS else "any"] = _rows(value)
        else:
            rest[key] = value
    if not words and len(rest) == 1:
        ((word, vectors),) = rest.items()
        if (
            isinstance(vectors, Tensor)
            and 1 <= vectors.dim() <= 2
            and vectors.shape[-1] > 1
            and "." not in word
        ):
            return {word: {"any": _rows(vectors)}}, {}
    return words, rest


def _rows(vectors: Tensor) -> Tensor:
    return vectors.detach().reshape(-1, vectors.shape[-1]).float()


class Embeddings:
    """The embeddings of one pipeline. `use` selects the active ones."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._words: dict[str, Words] = {}  # name of the file's adapter -> its words, by encoder
        self._originals: dict[str, tuple[nn.Module, Any]] = {}
        # Encoder -> word in lower case -> the characters that replace it in prompts.
        self._texts: dict[str, dict[str, str]] = {}

    def add(self, name: str, path: str, words: Words) -> None:
        """Add a file's embeddings. ConfigError for vectors that fit no text encoder."""
        if words:
            self._words[name] = {
                word: self._by_encoder(path, word, parts) for word, parts in words.items()
            }

    def has(self, name: str) -> bool:
        """Return whether this adapter's file holds embeddings."""
        return name in self._words

    def forget(self, name: str) -> None:
        """Remove a file's embeddings."""
        self._words.pop(name, None)

    def use(self, names: Sequence[str]) -> None:
        """Activate exactly these."""
        self._restore()
        self._texts = {}
        number = 0
        vectors: dict[str, dict[str, Tensor]] = {}
        for words in (self._words[name] for name in names if name in self._words):
            for word, by_encoder in words.items():
                for encoder, rows in by_encoder.items():
                    characters = [
                        chr(FIRST_CHARACTER + number + place) for place in range(len(rows))
                    ]
                    number += len(rows)
                    self._texts.setdefault(encoder, {})[word.lower()] = " ".join(characters)
                    vectors.setdefault(encoder, {}).update(zip(characters, rows, strict=True))
        for encoder, rows_of_encoder in vectors.items():
            self._extend(encoder, rows_of_encoder)

    def arguments(self, arguments: Mapping[str, Any], parameters: Container[str]) -> dict[str, Any]:
        """Return the pipeline call's arguments with the prompts rewritten for each text encoder."""
        changed = dict(arguments)
        if not self._texts:
            return changed
        for name in ("prompt", "negative_prompt"):
            if not (given := arguments.get(name)):
                continue
            changed[name] = self._read(given, "text_encoder")
            for number in (2, 3):
                if f"{name}_{number}" in parameters:
                    changed[f"{name}_{number}"] = self._read(given, f"text_encoder_{number}")
        return changed

    def _read(self, given: str | list[str], encoder: str) -> str | list[str]:
        return (
            self.in_words(given, encoder)
            if isinstance(given, str)
            else [self.in_words(text, encoder) for text in given]
        )

    def in_words(self, text: str, encoder: str) -> str:
        """Return the prompt rewritten for this text encoder. ComfyUI's `embedding:word` works."""
        texts = self._texts.get(encoder, {})
        if not texts:
            return text
        words = "|".join(re.escape(word) for word in sorted(texts, key=len, reverse=True))
        pattern = rf"(?<!\w)(?:embedding:)?({words})(?:\.safetensors|\.pt|\.bin)?(?!\w)"
        return re.sub(pattern, lambda match: texts[match[1].lower()], text, flags=re.IGNORECASE)

    def _by_encoder(self, path: str, word: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        widths = {
            name: encoder.get_input_embeddings().embedding_dim for name, encoder in self._encoders()
        }
        found = {}
        for part, vectors in parts.items():
            names = [
                name
                for name in _ENCODERS.get(part, widths)
                if widths.get(name) == vectors.shape[-1]
            ]
            if not names:
                readers = (
                    ", ".join(f"{name} reads {width}" for name, width in widths.items())
                    or "there is no text encoder to read them"
                )
                raise ConfigError(
                    f"lora={path} holds the embedding {word!r} with vectors of width "
                    f"{vectors.shape[-1]} ({part}), but {readers}. Give an embedding made for this "
                    "model type."
                )
            found[names[0]] = vectors
        return found

    def _encoders(self) -> Iterator[tuple[str, Any]]:
        for name, module in self._pipe.components.items():
            if (
                name.startswith("text_encoder")
                and isinstance(module, nn.Module)
                and self._tokenizer(name) is not None
            ):
                yield name, module

    def _tokenizer(self, encoder: str) -> Any:
        return getattr(self._pipe, encoder.replace("text_encoder", "tokenizer"), None)

    def _extend(self, name: str, vectors: Mapping[str, Tensor]) -> None:
        """Add one token per vector to the encoder's vocabulary."""
        encoder, tokenizer = getattr(self._pipe, name), self._tokenizer(name)
        original = encoder.get_input_embeddings()
        if original.weight.is_meta:
            raise ConfigError(
                "embeddings are not available with --enable_sequential_cpu_offload, which keeps "
                "the vocabulary elsewhere. Leave out the embedding, or use "
                "--enable_model_cpu_offload."
            )
        tokenizer.add_tokens(
            [
                AddedToken(character, lstrip=True, rstrip=True, normalized=False)
                for character in vectors
            ]
        )
        ids = {character: tokenizer.convert_tokens_to_ids(character) for character in vectors}
        weight = original.weight.detach()
        extended = weight.new_zeros(max(weight.shape[0], max(ids.values()) + 1), weight.shape[1])
        extended[: weight.shape[0]] = weight
        for character, vector in vectors.items():
            extended[ids[character]] = vector.to(weight)
        self._originals[name] = original, getattr(_reader(encoder), "eos_token_id", None)
        encoder.set_input_embeddings(
            nn.Embedding.from_pretrained(extended, padding_idx=original.padding_idx)
        )
        if hasattr(_reader(encoder), "eos_token_id"):
            # old CLIP configurations find the end of the text by the highest token
            _reader(encoder).eos_token_id = tokenizer.eos_token_id

    def _restore(self) -> None:
        for name, (original, end) in self._originals.items():
            encoder = getattr(self._pipe, name)
            encoder.set_input_embeddings(original)
            if end is not None:
                _reader(encoder).eos_token_id = end
        self._originals.clear()


def _reader(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder)
