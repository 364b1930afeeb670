"""Prompt weights, and prompts longer than CLIP's 77 tokens: by Compel, or by the rules of A1111.

The model table says which states are read of which text encoder.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from backends.errors import ConfigError, UnsupportedError
from backends.generation.text.emphasis import Part, parse_emphasis
from backends.generation.text.unread import Cuts, UnreadTokens
from backends.model_table import ModelSpec
from backends.request import GenerateRequest

logger = logging.getLogger(__name__)

_KINDS = {
    "last": "LAST_HIDDEN_STATES_NORMALIZED",
    "penultimate": "PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED",
    "pooled": "POOLED",
}
_POOLED = {"prompt": "pooled_prompt_embeds", "negative_prompt": "negative_pooled_prompt_embeds"}
COMMA_REACH = 20
"""A1111's default: a chunk ends at a comma if one is among its last 20 tokens."""
MAX_CHUNKS = 96
NUM_KEPT, MAX_KEPT_BYTES = 16, 64_000_000
"""Encoded prompts that are kept, and their bytes on the device."""


class Reader(Protocol):
    """One text encoder that reads weighted text."""

    def __call__(self, text: str) -> Tensor | tuple[Tensor, Tensor]:
        """Return (1, T, D), and (1, P) if the encoder also gives pooled embeddings."""
        ...

    def pad_conditioning_tensors_to_same_length(self, tensors: list[Tensor]) -> list[Tensor]: ...


class WeightedPrompts:
    """Turns a request's prompts into embeddings."""

    def __init__(
        self, pipe: Any, spec: ModelSpec, readers: Sequence[tuple[str, dict[str, Reader], str]]
    ) -> None:
        """readers: (name of the text encoder, its reader of each prompt, the states it reads)."""
        self._zeros_for_nothing = bool(pipe.config.get("force_zeros_for_empty_prompt"))
        self._has_negative = spec.guidance == "cfg"
        self._readers = readers

    def arguments(
        self, request: GenerateRequest, *, read: Callable[[str, str], str]
    ) -> dict[str, Tensor]:
        """Return embeddings of both prompts, (1, T, D) of equal length, instead of the texts.

        read: (text, name of a text encoder) -> the text as that encoder reads it.
        """
        texts = {"prompt": request.prompt or "", "negative_prompt": request.negative_prompt or ""}
        if not self._has_negative or (not texts["negative_prompt"] and self._zeros_for_nothing):
            del texts["negative_prompt"]  # the pipeline uses zeros, which no text encodes to
        embeds: dict[str, list[Tensor]] = {name: [] for name in texts}
        arguments = {}
        for encoder, readers, kind in self._readers:
            pair = {}
            for name, text in texts.items():
                result = readers[name](read(text, encoder))
                if isinstance(result, tuple):
                    result, arguments[_POOLED[name]] = result
                pair[name] = result
            if kind == "pooled":
                arguments |= {_POOLED[name]: tensor for name, tensor in pair.items()}
                continue
            padded = readers["prompt"].pad_conditioning_tensors_to_same_length(list(pair.values()))
            for name, tensor in zip(pair, padded, strict=True):
                embeds[name].append(tensor)
        return arguments | {
            f"{name}_embeds": _side_by_side(tensors) for name, tensors in embeds.items()
        }


def compel_prompts(pipe: Any, spec: ModelSpec) -> WeightedPrompts:
    """Return prompts as Compel reads them: (red)1.3 sets a weight, ++ and -- change it by 1.1.

    ConfigError if Compel is not installed.
    """
    try:
        import compel
    except ImportError as error:
        raise ConfigError(
            "--compel needs the package compel, which is not installed. Install it, or leave "
            "the option out."
        ) from error
    readers = []
    for name, reading in spec.compel.items():
        kind, *gives = reading.split(" + ")
        encoder = getattr(pipe, name)
        reader = compel.Compel(
            tokenizer=getattr(pipe, name.replace("text_encoder", "tokenizer")),
            text_encoder=encoder,
            returned_embeddings_type=getattr(compel.ReturnedEmbeddingsType, _KINDS[kind]),
            requires_pooled=gives == ["pooled"],
            truncate_long_prompts=kind == "pooled"
            or not hasattr(encoder.config, "max_position_embeddings"),
            device=pipe._execution_device,
        )
        readers.append((name, dict.fromkeys(_POOLED, reader), kind))
    return WeightedPrompts(pipe, spec, readers)


def a1111_prompts(pipe: Any, spec: ModelSpec, *, clip_skip: int | None) -> WeightedPrompts:
    """Return prompts as A1111 reads them (backends/generation/text/emphasis.py).

    clip_skip: as in diffusers, it acts on the prompt and not on the negative one.
    """
    readers = []
    for name, reading in spec.compel.items():
        kind, *gives = reading.split(" + ")
        read_by = {
            prompt: _ClipReader(
                getattr(pipe, name),
                getattr(pipe, name.replace("text_encoder", "tokenizer")),
                layer=(clip_skip or 0) if prompt == "prompt" else 0,
                is_normalized=kind == "last",
                has_pooled=gives == ["pooled"],
                device=pipe._execution_device,
            )
            for prompt in _POOLED
        }
        readers.append((name, read_by, kind))
    return WeightedPrompts(pipe, spec, readers)


def require_readable_prompts(request: GenerateRequest, spec: ModelSpec) -> None:
    """UnsupportedError or RequestError for prompts that `prompt_syntax` does not allow."""
    if request.prompt_syntax is None:
        return
    if not spec.has_clip_prompts:
        raise UnsupportedError(
            f"prompt_syntax is not available: {spec.title} has no weights of words. Leave it out.",
            field="prompt_syntax",
        )
    if request.compel:
        raise UnsupportedError(
            "prompt_syntax and compel are two ways to read a prompt. Leave one of them out.",
            field="prompt_syntax",
        )
    for field in ("prompt", "negative_prompt"):
        parse_emphasis(getattr(request, field) or "", field=field)


class _ClipReader:
    """One CLIP text encoder that reads prompts by the rules of A1111.

    Each chunk of 75 tokens is encoded by itself, with a start and an end. Its states are multiplied
    by the weights and scaled so that their mean stays.
    """

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        *,
        layer: int,
        is_normalized: bool,
        has_pooled: bool,
        device: torch.device,
    ) -> None:
        """layer: layers to skip at the end, beyond those that the model type itself skips."""
        self._encoder, self._tokenizer, self._device = encoder, tokenizer, device
        self._layer, self._is_normalized, self._has_pooled = layer, is_normalized, has_pooled
        self._length = tokenizer.model_max_length - 2
        self._comma = tokenizer.get_vocab().get(",</w>")

    def __call__(self, text: str) -> Tensor | tuple[Tensor, Tensor]:
        """Return (1, 77 per chunk, D), and the first chunk's pooled states if there are any."""
        chunks = self._chunks(parse_emphasis(text, field="prompt"))
        states, pooled = zip(*map(self._encode, chunks), strict=True)
        joined = torch.cat(states, dim=1)
        return (joined, pooled[0]) if self._has_pooled else joined

    def pad_conditioning_tensors_to_same_length(self, tensors: list[Tensor]) -> list[Tensor]:
        """Repeat each (1, T, D) up to the least common multiple of their lengths.

        Attention over repeated keys equals attention over them once, so a short prompt acts beside
        a long one as it does alone.
        """
        length = math.lcm(*(tensor.shape[1] for tensor in tensors))
        if length > MAX_CHUNKS * self._tokenizer.model_max_length:
            raise UnsupportedError(
                "prompt and negative_prompt are too long to be combined. Shorten one of them.",
                field="prompt",
            )
        return [tensor.repeat(1, length // tensor.shape[1], 1) for tensor in tensors]

    def _chunks(self, parts: Sequence[Part]) -> list[list[tuple[int, float]]]:
        """Return (token, weight) of each chunk."""
        chunks: list[list[tuple[int, float]]] = [[]]
        comma = -1  # place of the last one in the current chunk
        for part in parts:
            if part.is_break:
                chunks.append([])
                comma = -1
                continue
            ids = self._tokenizer(
                part.text, add_special_tokens=False, truncation=False, verbose=False
            ).input_ids
            for token in ids:
                chunk = chunks[-1]
                if token == self._comma:
                    comma = len(chunk)
                if len(chunk) == self._length:
                    is_near = comma >= 0 and len(chunk) - comma <= COMMA_REACH
                    cut = comma + 1 if is_near and token != self._comma else len(chunk)
                    chunks[-1], moved = chunk[:cut], chunk[cut:]
                    chunks.append(moved)
                    comma = -1
                chunks[-1].append((token, part.weight))
        if len(chunks) > 1 and not chunks[-1]:
            chunks.pop()
        return chunks

    def _encode(self, chunk: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
        """Return (1, 77, D) and the encoder's first output."""
        tokenizer, missing = self._tokenizer, self._length - len(chunk)
        ids = [token for token, _ in chunk]
        padded = [
            tokenizer.bos_token_id,
            *ids,
            tokenizer.eos_token_id,
            *[tokenizer.pad_token_id] * missing,
        ]
        output = self._encoder(
            torch.tensor([padded], device=self._device), output_hidden_states=True
        )
        states = self._states(output).clone()
        weights = [weight for _, weight in chunk]
        if any(weight != 1 for weight in weights):
            factors = torch.tensor([1.0, *weights, *[1.0] * (1 + missing)], device=states.device)
            weighed = states.float() * factors[None, :, None]
            states = (weighed * (states.float().mean() / weighed.mean())).to(states.dtype)
        return states, output[0]

    def _states(self, output: Any) -> Tensor:
        """Return the states that the pipeline itself reads, (1, 77, D)."""
        if not self._is_normalized:
            return output.hidden_states[-(self._layer + 2)]
        if self._layer == 0:
            return output[0]
        encoder = getattr(self._encoder, "text_model", self._encoder)
        return encoder.final_layer_norm(output.hidden_states[-(self._layer + 1)])


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """Concatenate several encoders' (1, T, D) embeddings of one text along the last dim.

    All are cut to the shortest T.
    """
    length = min(tensor.shape[1] for tensor in tensors)
    return torch.cat([tensor[:, :length] for tensor in tensors], dim=-1)


class PromptCache:
    """Keeps what the last prompts were encoded to: most jobs of a host differ in their seed alone.

    It stands in front of one pipeline's `encode_prompt`. Ranks that encode together must forget
    together.
    """

    def __init__(self, pipe: Any, unread: UnreadTokens, *, facts: Callable[[], object]) -> None:
        """unread: is told what a kept encoding had cut. facts: what an encoding depends on besides
        the arguments.
        """
        self._facts, self._unread = facts, unread
        self._cuts: dict[Hashable, Cuts] = {}
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._pipe = pipe
        self.num_hits = 0
        if hasattr(pipe, "encode_prompt"):
            self._encode = pipe.encode_prompt
            pipe.encode_prompt = self._encoded

    def forget(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self._cuts.clear()

    def _encoded(self, *args: Any, **kwargs: Any) -> Any:
        """Return the encoding of these arguments. Arguments that hold tensors are not kept."""
        try:
            key = _frozen([args, sorted(kwargs.items()), self._facts(), self._is_guided()])
        except TypeError:
            return self._encode(*args, **kwargs)
        if key in self._kept:
            self.num_hits += 1
            self._kept.move_to_end(key)
            self._unread.add(self._cuts[key])
        else:
            with self._unread.recorded() as self._cuts[key]:
                self._kept[key] = self._encode(*args, **kwargs)
            while len(self._kept) > NUM_KEPT or self._num_bytes() > MAX_KEPT_BYTES:
                last = self._kept.popitem(last=False)
                del self._cuts[last[0]]
                if not self._kept:
                    return last[1]
        return pytree.tree_map(
            lambda value: value.clone() if isinstance(value, Tensor) else value, self._kept[key]
        )

    def _is_guided(self) -> bool:
        """Return whether guidance is on, which some classes do not pass to their encode_prompt."""
        scale = getattr(self._pipe, "_guidance_scale", None)
        return isinstance(scale, int | float) and scale > 1

    def _num_bytes(self) -> int:
        return sum(
            value.numel() * value.element_size()
            for value in pytree.tree_leaves(list(self._kept.values()))
            if isinstance(value, Tensor)
        )


def _frozen(value: Any) -> Hashable:
    """Return a key. TypeError for what may change or cannot be compared."""
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return ("dict", *((key, _frozen(item)) for key, item in value.items()))
    if value is None or isinstance(value, str | int | float | bool | torch.device | torch.dtype):
        return (type(value).__name__, value)
    raise TypeError(type(value).__name__)
