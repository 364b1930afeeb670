"""Random weights use attention and the prompt weakly; this scales the layers that decide how much they matter."""

import re

import torch

ATTENTION = re.compile(r"\.(to_q|to_k|to_v|to_out\.0|to_add_out|add_[qkv]_proj|q_proj|k_proj|v_proj|out_proj)\.weight$")


def scale_attention(module: torch.nn.Module, gain: float) -> None:
    """Multiply the attention projections of `module` by `gain`, in place."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ATTENTION.search(f".{name}"):
                parameter.mul_(gain)
