"""PipeFusion's schedule in one process: what N ranks must compute, written without any of the code
under test.

`simulate(transformer, ...)` replaces the denoiser's forward by a loop over patches on the same
layers, with attention processors that keep keys and values of the step before in plain tensors.
Sources: PipeFusion, arXiv:2405.14430; docs/xdit.md for the order of tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from backends.parallel import hooks

Memory = dict[str, Tensor]


class _Patches:
    """The patch that is being computed (None: all tokens) and, per layer and stream, all keys and
    values known so far.
    """

    def __init__(self) -> None:
        self.spans: dict[str, slice] | None = None
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def known(
        self, layer: nn.Module, stream: str, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """key, value: (B, S, H, D) of the patch. Returns those of all tokens of this stream."""
        if self.spans is None:
            self._known[layer, stream] = key.clone(), value.clone()
        keys, values = self._known[layer, stream]
        if self.spans is not None:
            keys[:, self.spans[stream]], values[:, self.spans[stream]] = key, value
        return keys, values


def _heads(
    layer: Any, projections: str, x: Tensor, norms: tuple[Any, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        getattr(layer, name)(x).unflatten(-1, (layer.heads, -1)) for name in projections.split()
    )
    return (
        (query if norms[0] is None else norms[0](query)),
        (key if norms[1] is None else norms[1](key)),
        value,
    )


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        .transpose(1, 2)
        .flatten(2)
    )


class _Joint:
    """sd3: image and text, or (attn2) the image alone."""

    def __init__(self, patches: _Patches) -> None:
        self.patches = patches

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: object,
    ) -> Any:
        query, key, value = _heads(
            attn, "to_q to_k to_v", hidden_states, (attn.norm_q, attn.norm_k)
        )
        key, value = self.patches.known(attn, "image", key, value)
        if encoder_hidden_states is None:
            return attn.to_out[0](_attention(query, key, value))
        norms = attn.norm_added_q, attn.norm_added_k
        text_query, text_key, text_value = _heads(
            attn, "add_q_proj add_k_proj add_v_proj", encoder_hidden_states, norms
        )
        text_key, text_value = self.patches.known(attn, "text", text_key, text_value)
        image = _attention(query, torch.cat([key, text_key], 1), torch.cat([value, text_value], 1))
        text = _attention(
            text_query, torch.cat([key, text_key], 1), torch.cat([value, text_value], 1)
        )
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


class _Flux:
    """flux: both kinds of blocks. In single ones the text is the first `num_text` tokens of the
    patch.
    """

    _attention_backend = _parallel_config = None

    def __init__(self, patches: _Patches) -> None:
        self.patches = patches
        self.num_text = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        _mask: Any = None,
        image_rotary_emb: Any = None,
    ):
        query, key, value = _heads(
            attn, "to_q to_k to_v", hidden_states, (attn.norm_q, attn.norm_k)
        )
        if encoder_hidden_states is not None:
            norms = attn.norm_added_q, attn.norm_added_k
            text = _heads(attn, "add_q_proj add_k_proj add_v_proj", encoder_hidden_states, norms)
            query, key, value = (
                torch.cat(pair, 1) for pair in zip(text, (query, key, value), strict=True)
            )
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        t = self.num_text
        text_keys, image_keys = (
            self.patches.known(attn, "text", key[:, :t], value[:, :t]),
            self.patches.known(attn, "image", key[:, t:], value[:, t:]),
        )
        out = _attention(
            query, *(torch.cat(pair, 1) for pair in zip(text_keys, image_keys, strict=True))
        )
        return (
            (attn.to_out[0](out[:, t:]), attn.to_add_out(out[:, :t]))
            if encoder_hidden_states is not None
            else out
        )


class _Self:
    """pixart: attn1."""

    def __init__(self, patches: _Patches) -> None:
        self.patches = patches

    def __call__(self, attn: Any, hidden_states: Tensor, **_: object) -> Tensor:
        query, key, value = _heads(attn, "to_q to_k to_v", hidden_states, (None, None))
        return attn.to_out[0](_attention(query, *self.patches.known(attn, "image", key, value)))


def _sd3(
    model: Any, call: dict[str, Any], patches: _Patches, processor: _Joint
) -> tuple[Tensor, Any]:
    image, text = (
        model.pos_embed(call["hidden_states"]),
        model.context_embedder(call["encoder_hidden_states"]),
    )
    temb = model.time_text_embed(call["timestep"], call["pooled_projections"])

    def run(x: Tensor, e: Tensor) -> Tensor:
        for block in model.transformer_blocks:
            e, x = block(hidden_states=x, encoder_hidden_states=e, temb=temb)
        return model.proj_out(model.norm_out(x, temb))

    return (text, image), lambda text_span, image_span: run(
        image[:, image_span], text[:, text_span]
    )


def _pixart(
    model: Any, call: dict[str, Any], patches: _Patches, processor: _Self
) -> tuple[Tensor, Any]:
    image = model.pos_embed(call["hidden_states"])
    batch = image.shape[0]
    timestep, embedded = model.adaln_single(
        call["timestep"], call["added_cond_kwargs"], batch_size=batch, hidden_dtype=image.dtype
    )
    text = model.caption_projection(call["encoder_hidden_states"])
    mask = ((1 - call["encoder_attention_mask"].to(image.dtype)) * -10000.0).unsqueeze(1)
    shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)

    def run(x: Tensor) -> Tensor:
        for block in model.transformer_blocks:
            x = block(x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timestep)
        return model.proj_out(model.norm_out(x) * (1 + scale) + shift)

    return (image[:, :0], image), lambda _text_span, image_span: run(image[:, image_span])


def _flux(
    model: Any, call: dict[str, Any], patches: _Patches, processor: _Flux
) -> tuple[Tensor, Any]:
    image, text = (
        model.x_embedder(call["hidden_states"]),
        model.context_embedder(call["encoder_hidden_states"]),
    )
    temb = model.time_text_embed(
        call["timestep"] * 1000, call["guidance"] * 1000, call["pooled_projections"]
    )

    def run(x: Tensor, e: Tensor, ids: Tensor) -> Tensor:
        processor.num_text = e.shape[1]
        rotary = model.pos_embed(ids)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            e, x = block(
                hidden_states=x, encoder_hidden_states=e, temb=temb, image_rotary_emb=rotary
            )
        return model.proj_out(model.norm_out(x, temb))

    def run_spans(text_span: slice, image_span: slice) -> Tensor:
        return run(
            image[:, image_span],
            text[:, text_span],
            torch.cat([call["txt_ids"][text_span], call["img_ids"][image_span]]),
        )

    return (text, image), run_spans


_MODELS = {
    "sd3": (_sd3, _Joint),
    "flux": (_flux, _Flux),
    "pixa": (_pixart, _Self),
    "pixs": (_pixart, _Self),
}


def simulate(model: nn.Module, name: str, *, num_patches: int, warmup_steps: int) -> None:
    """From now on every call of this denoiser is one step of PipeFusion; the first `warmup_steps`
    are synchronous.
    """
    prepare, processor_class = _MODELS[name]
    patches = _Patches()
    processor = processor_class(patches)
    for path, module in model.named_modules():
        if hasattr(module, "processor") and (
            processor_class is not _Self or path.endswith("attn1")
        ):
            module.processor = processor
    step = 0

    def forward(_forward: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        nonlocal step
        call = {**({"hidden_states": args[0]} if args else {}), **kwargs}
        (text, image), run = prepare(model, call, patches, processor)
        total = text.shape[1] + image.shape[1]
        patches.spans = None
        if step < warmup_steps:
            tokens = run(slice(0, text.shape[1]), slice(0, image.shape[1]))
        else:
            outputs = []
            for patch in range(num_patches):
                start, stop = total * patch // num_patches, total * (patch + 1) // num_patches
                inside = [max(0, bound - text.shape[1]) for bound in (start, stop)]
                patches.spans = {
                    "text": slice(min(start, text.shape[1]), min(stop, text.shape[1])),
                    "image": slice(*inside),
                }
                outputs.append(run(patches.spans["text"], patches.spans["image"]))
            tokens = torch.cat(outputs, dim=1)
        step += 1
        return (_unpatch(model, tokens, call["hidden_states"]),)

    hooks.attach(model, "simulation", forward)


def _unpatch(model: Any, tokens: Tensor, latents: Tensor) -> Tensor:
    if latents.dim() == 3:
        return tokens
    size = model.config.patch_size
    height, width = latents.shape[-2] // size, latents.shape[-1] // size
    pixels = tokens.reshape(tokens.shape[0], height, width, size, size, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(
        tokens.shape[0], -1, height * size, width * size
    )
