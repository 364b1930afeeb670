"""Prompt weights, and prompts longer than CLIP's 77 tokens, by Compel.

The model table says which states Compel reads of which text encoder.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.errors import ConfigError, UnsupportedError
from backends.model_table import ModelSpec
from backends.request import GenerateRequest

logger = logging.getLogger(__name__)

_KINDS = {
    "last": "LAST_HIDDEN_STATES_NORMALIZED",
    "penultimate": "PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED",
    "pooled": "POOLED",
}
_POOLED = {"prompt": "pooled_prompt_embeds", "negative_prompt": "negative_pooled_prompt_embeds"}


class WeightedPrompts:
    """Turns a request's prompts into embeddings.

    (red)1.3 sets a weight, ++ and -- change it by steps of 1.1. Long prompts are encoded in chunks.
    """

    def __init__(self, pipe: Any, spec: ModelSpec) -> None:
        try:
            import compel
        except ImportError as error:
            raise ConfigError(
                "--compel needs the package compel, which is not installed. Install it, or leave "
                "the option out."
            ) from error
        self._zeros_for_nothing = bool(pipe.config.get("force_zeros_for_empty_prompt"))
        self._has_negative = spec.guidance == "cfg"
        self._readers = []
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
            self._readers.append((name, reader, kind))

    def arguments(
        self, request: GenerateRequest, *, read: Callable[[str, str], str]
    ) -> dict[str, Tensor]:
        """Return embeddings of both prompts, (1, T, D) of equal length, instead of the texts.

        read: (text, name of a text encoder) -> the text as that encoder reads it. UnsupportedError
        with clip_skip.
        """
        if request.clip_skip:
            raise UnsupportedError(
                f"clip_skip={request.clip_skip} is not available on a host that was started with "
                "--compel. Leave one of them out."
            )
        texts = {"prompt": request.prompt or "", "negative_prompt": request.negative_prompt or ""}
        if not self._has_negative or (not texts["negative_prompt"] and self._zeros_for_nothing):
            del texts["negative_prompt"]  # the pipeline uses zeros, which no text encodes to
        embeds: dict[str, list[Tensor]] = {name: [] for name in texts}
        arguments = {}
        for encoder, reader, kind in self._readers:
            pair = {}
            for name, text in texts.items():
                result = reader(read(text, encoder))
                if isinstance(result, tuple):
                    result, arguments[_POOLED[name]] = result
                pair[name] = result
            if kind == "pooled":
                arguments |= {_POOLED[name]: tensor for name, tensor in pair.items()}
                continue
            padded = reader.pad_conditioning_tensors_to_same_length(list(pair.values()))
            for name, tensor in zip(pair, padded, strict=True):
                embeds[name].append(tensor)
        return arguments | {
            f"{name}_embeds": _side_by_side(tensors) for name, tensors in embeds.items()
        }


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """Concatenate several encoders' (1, T, D) embeddings of one text along the last dim.

    All are cut to the shortest T.
    """
    length = min(tensor.shape[1] for tensor in tensors)
    return torch.cat([tensor[:, :length] for tensor in tensors], dim=-1)


def unread_tokens(pipe: Any, spec: ModelSpec, request: GenerateRequest) -> int:
    """Return how many tokens of the longer prompt CLIP drops beyond its 77.

    0 if another text encoder also reads the prompt.
    """
    if spec.compel.get("text_encoder", "pooled") == "pooled":
        return 0
    tokenizer = pipe.tokenizer
    texts = [text for text in (request.prompt, request.negative_prompt) if text]
    return max(
        (
            len(tokenizer(text, truncation=False).input_ids) - tokenizer.model_max_length
            for text in texts
        ),
        default=0,
    )
