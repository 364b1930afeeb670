"""Parts of a denoiser in which no rank waits for another: each can be one compiled graph."""

from collections.abc import Iterator

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

_LOOKS_AROUND = (Attention, AttentionModuleMixin, nn.modules.conv._ConvNd, nn.GroupNorm)


def quiet_regions(module: nn.Module) -> list[nn.Module]:
    """Return the largest modules that work on single rows or tokens.

    They contain no attention, convolution or group norm, and more than one linear layer.
    """
    return list(_visit(module))


def _visit(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, Attention | AttentionModuleMixin):
            continue
        is_quiet = not any(isinstance(part, _LOOKS_AROUND) for part in child.modules())
        if (
            is_quiet
            and not isinstance(child, nn.ModuleList)
            and sum(1 for part in child.modules() if isinstance(part, nn.Linear)) > 1
        ):
            yield child
        else:
            yield from _visit(child)
