"""Prompt weights and prompts longer than the text encoder reads, by Compel, for types whose text encoders are CLIP alone."""

import logging
from typing import Any

from torch import Tensor

from backends.errors import ConfigError, UnsupportedError
from backends.request import GenerateRequest

logger = logging.getLogger(__name__)


class WeightedPrompts:
    """Turns the texts of a request into embeddings: (red)1.3 weighs, ++ and -- do in steps of 1.1, long prompts are read in pieces."""

    def __init__(self, pipe: Any) -> None:
        try:
            import compel
        except ImportError as error:
            raise ConfigError("--compel needs the package compel, which is not installed. Install it, or leave the option out.") from error
        self._zeros_for_nothing = bool(pipe.config.get("force_zeros_for_empty_prompt"))
        kinds = compel.ReturnedEmbeddingsType
        names = [name for name in ("", "_2") if getattr(pipe, f"text_encoder{name}", None) is not None]
        kind = kinds.LAST_HIDDEN_STATES_NORMALIZED if len(names) == 1 else kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        self._readers = [
            compel.Compel(
                tokenizer=getattr(pipe, f"tokenizer{name}"),
                text_encoder=getattr(pipe, f"text_encoder{name}"),
                returned_embeddings_type=kind,
                requires_pooled=name == "_2",
                truncate_long_prompts=False,
                device=pipe._execution_device,
            )
            for name in names
        ]

    def arguments(self, request: GenerateRequest) -> dict[str, Tensor]:
        """Embeddings of both prompts, (1, T, D) of one length, in place of their texts. UnsupportedError with clip_skip."""
        if request.clip_skip:
            raise UnsupportedError(
                f"clip_skip={request.clip_skip} is not available on a host that was started with --compel. Leave one of them out."
            )
        texts = {"prompt": request.prompt or "", "negative_prompt": request.negative_prompt or ""}
        if not texts["negative_prompt"] and self._zeros_for_nothing:
            del texts["negative_prompt"]  # the pipeline takes zeros for it, which no text gives
        embeds: dict[str, list[Tensor]] = {name: [] for name in texts}
        arguments = {}
        for reader in self._readers:
            pair = {}
            for name, text in texts.items():
                result = reader(text)
                if isinstance(result, tuple):
                    arguments["pooled_prompt_embeds" if name == "prompt" else "negative_pooled_prompt_embeds"] = result[1]
                pair[name] = result[0] if isinstance(result, tuple) else result
            padded = reader.pad_conditioning_tensors_to_same_length(list(pair.values()))
            for name, tensor in zip(pair, padded, strict=True):
                embeds[name].append(tensor)
        return arguments | {f"{name}_embeds": _side_by_side(tensors) for name, tensors in embeds.items()}


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """What several encoders made of one text, along the last dim; all read the same number of pieces."""
    import torch

    length = min(tensor.shape[1] for tensor in tensors)
    return torch.cat([tensor[:, :length] for tensor in tensors], dim=-1)


def unread_tokens(pipe: Any, request: GenerateRequest) -> int:
    """Tokens of the longer prompt that CLIP will not see, because it reads 77 at most. 0 for pipelines without a CLIP tokenizer."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or not type(tokenizer).__name__.startswith("CLIP"):
        return 0
    texts = [text for text in (request.prompt, request.negative_prompt) if text]
    return max((len(tokenizer(text, truncation=False).input_ids) - tokenizer.model_max_length for text in texts), default=0)
