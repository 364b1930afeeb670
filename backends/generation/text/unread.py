"""How many tokens of a prompt no text encoder reads: pipelines cut what is too long for them."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

Cuts = dict[str, list[int]]
"""Tokenizer -> tokens that it cut from each row of a batch, or from all of them."""

SLICED_EMBEDDINGS = "[:, :max_sequence_length]"
"""In the source of pipelines that cut the embeddings and not the tokens, as Qwen-Image's."""
SLICED_PIECES = "all_tokens[: self.tokenizer_max_length]"
"""In that of pipelines that cut the tokens of a prompt's pieces, as LongCat's."""


class UnreadTokens:
    """Watches the tokenizers of one pipeline.

    A part that one of several text encoders reads is read. So what counts is the encoder that cuts
    least: T5 has 512 tokens where CLIP has 77.
    """

    def __init__(self, pipe: Any) -> None:
        self._cuts: Cuts = {}
        self._most: int | None = None
        """Tokens of which a pipeline keeps the embeddings."""
        self._pieces, self._most_in_pieces = 0, 0
        self._after_pieces: tuple[str, ...] = ()
        watched = set()
        for name, part in getattr(pipe, "components", {}).items():
            for tokenizer in (part, getattr(part, "tokenizer", None)):  # a processor has one
                if isinstance(tokenizer, PreTrainedTokenizerBase) and id(tokenizer) not in watched:
                    watched.add(id(tokenizer))
                    _watch(tokenizer, name, self._called)

    def begin(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        """Forget what was cut before. pipe: what runs now. arguments: the request's own."""
        self._cuts, self._most = {}, None
        if _has(type(pipe), "encode_prompt", SLICED_EMBEDDINGS):
            default = inspect.signature(pipe.__call__).parameters["max_sequence_length"].default
            most = arguments.get("max_sequence_length", default)
            template = getattr(pipe, "prompt_template_encode_start_idx", 0)
            self._most = template + most if isinstance(most, int) else None
        # LongCat encodes a prompt in pieces, cuts their tokens, and then encodes what is around it
        self._pieces, self._most_in_pieces = 0, getattr(pipe, "tokenizer_max_length", 0)
        around = ("prompt_template_encode_prefix", "prompt_template_encode_suffix")
        is_cut = _has(type(pipe), "_encode_prompt", SLICED_PIECES)
        self._after_pieces = tuple(getattr(pipe, each) for each in around) if is_cut else ()

    def of_row(self, row: int, num_rows: int) -> int:
        """Return how many tokens of this row's longer prompt were not read since `begin`."""
        return min(
            (
                cuts[row] if len(cuts) == num_rows else max(cuts, default=0)
                for cuts in self._cuts.values()
            ),
            default=0,
        )

    @contextmanager
    def recorded(self) -> Iterator[Cuts]:
        """Yield what is cut meanwhile; it is filled at the end."""
        before, self._cuts = self._cuts, {}
        found: Cuts = {}
        try:
            yield found
        finally:
            found |= self._cuts
            self._cuts = before
            self.add(found)

    def add(self, cuts: Cuts) -> None:
        """Count what an encoding had cut, which is used again."""
        for name, rows in cuts.items():
            self._add(name, rows)

    def _called(self, name: str, texts: Sequence[str], cuts: list[int], lengths: list[int]) -> None:
        if self._most is not None:
            pairs = zip(cuts, lengths, strict=True)
            cuts = [max(cut, length - self._most) for cut, length in pairs]
        elif texts[0] in self._after_pieces:
            cuts, self._pieces = [max(0, self._pieces - self._most_in_pieces)], 0
        elif self._after_pieces:
            self._pieces += sum(lengths)
        self._add(name, cuts)

    def _add(self, name: str, rows: list[int]) -> None:
        known = self._cuts.get(name, [0] * len(rows))
        if len(known) != len(rows):
            known, rows = [max(known, default=0)], [max(rows, default=0)]
        self._cuts[name] = [max(pair) for pair in zip(known, rows, strict=True)]


@functools.cache
def _has(kind: type, method: str, text: str) -> bool:
    """Return whether this text is in the source of a class's method."""
    found = getattr(kind, method, None)
    return found is not None and text in inspect.getsource(found)


def _watch(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    report: Callable[[str, Sequence[str], list[int], list[int]], None],
) -> None:
    """Let the tokenizer report (name, texts, tokens cut from each, tokens of each)."""
    plain = type(tokenizer)

    def __call__(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = plain.__call__(self, text, *args, **kwargs)
        texts = [text] if isinstance(text, str) else text
        is_list = isinstance(texts, list | tuple) and len(texts) > 0
        if is_list and all(isinstance(each, str) for each in texts):
            limit = kwargs.get("max_length") or self.model_max_length
            special = kwargs.get("add_special_tokens", True)
            lengths = [
                len(plain.__call__(self, each, add_special_tokens=special, verbose=False).input_ids)
                for each in texts
            ]
            cut = [max(0, each - limit) if kwargs.get("truncation") else 0 for each in lengths]
            report(name, texts, cut, lengths)
        return result

    # an instance cannot have a `__call__` of its own
    tokenizer.__class__ = type(
        plain.__name__, (plain,), {"__call__": __call__, "__module__": plain.__module__}
    )
