"""Attention with masks and grouped queries, spread over ranks, equals torch's own on all tokens."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backends.errors import UnsupportedError
from backends.groups.mesh import Mesh
from backends.parallel.transformer_spec import TransformerSpec
from backends.plan import ParallelPlan
from backends.xdit.attention import Pass, SpreadAttention
from backends.xdit.layout import Layout, take

HEADS, WIDTH = 4, 8
NUM_TEXT, NUM_IMAGE = 5, 9


class Attention(nn.Module):
    """What a transformer's attention module does once its projections are done."""

    processor = None

    def forward(self, query, *, key, value, **options):
        return F.scaled_dot_product_attention(query, key, value, **options)


class Network(nn.Module):
    """One block with one attention module."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention()})])

    @property
    def attention(self):
        return self.blocks[0]["attn"]


def tensors(kv_heads, num_tokens):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, heads, num_tokens, WIDTH, generator=generator)
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def masks(num_tokens):
    """Key padding (two lengths in a batch), one for each query, one for each head, added numbers;
    the last one hides the first keys (all of the first rank's) from all but the last query.
    """
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    padding = torch.ones(2, 1, 1, num_tokens, dtype=torch.bool)
    padding[0, ..., 2:4], padding[1, ..., -3:] = False, False
    each = random(2, 1, num_tokens, num_tokens) > 0.4
    each[..., 1, :] = False  # a query that sees nothing
    late = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool)
    late[..., :-1, : num_tokens // 2] = False
    return {
        "none": None,
        "padding": padding,
        "without batch": each[0, 0],
        "each query": each,
        "each head": random(2, HEADS, num_tokens, num_tokens) > 0.4,
        "added": random(2, 1, num_tokens, num_tokens).log(),
        "late": late,
    }


def spread(rank, world_size, axes, *, with_text, is_text_first):
    """A network whose attention is spread, and what undoes it."""
    plan = ParallelPlan(method="xdit", axes=axes)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    spec = TransformerSpec(
        blocks=("blocks",), text="text" if with_text else None, is_text_first=is_text_first
    )
    layout = Layout(
        num_text=NUM_TEXT if with_text else 0, num_image=NUM_IMAGE, num_shards=world_size
    )
    attention = SpreadAttention(spec, mesh)
    network = Network()
    attention.attach(network)
    attention.current = Pass(layout=layout, is_text_first=is_text_first)
    own = layout.order([rank], is_joint=with_text, is_text_first=is_text_first)
    return mesh, attention, network.attention, own


def check_masks(rank, world_size, axes):
    for with_text, is_text_first in ((False, False), (True, True), (True, False)):
        num_tokens = NUM_IMAGE + NUM_TEXT * with_text
        mesh, attention, module, own = spread(
            rank, world_size, axes, with_text=with_text, is_text_first=is_text_first
        )
        for kv_heads, (what, mask) in itertools.product((4, 2, 1), masks(num_tokens).items()):
            whole = tensors(kv_heads, num_tokens)
            options = {"enable_gqa": kv_heads < HEADS}
            want = take(
                F.scaled_dot_product_attention(*whole, attn_mask=mask, **options), own, dim=2
            )
            parts = [take(tensor, own, dim=2) for tensor in whole]
            got = [module(parts[0], key=parts[1], value=parts[2], attn_mask=mask, **options)]
            if mask is not None and mask.shape[-2] == 1:  # built from this rank's tokens only
                got.append(
                    module(
                        parts[0],
                        key=parts[1],
                        value=parts[2],
                        attn_mask=take(mask, own, dim=-1),
                        **options,
                    )
                )
            for output in got:
                torch.testing.assert_close(
                    output,
                    want,
                    rtol=0,
                    atol=2e-6,
                    msg=lambda text, case=(what, kv_heads): f"{case}: {text}",
                )
        attention.detach()
        mesh.destroy()


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_masks_and_grouped_queries_on_two_ranks_match_torch(run_on_ranks, axis):
    run_on_ranks(check_masks, 2, ((axis, 2),))


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [(("ring", 2), ("ulysses", 2)), (("ulysses", 4),), (("ring", 4),), (("ulysses", 3),)]
)
def test_masks_and_grouped_queries_on_more_ranks_match_torch(run_on_ranks, axes):
    world_size = 1
    for _, degree in axes:
        world_size *= degree
    run_on_ranks(check_masks, world_size, axes)


def check_refusals(rank, world_size):
    mesh, attention, module, own = spread(
        rank, world_size, (("ulysses", 2),), with_text=False, is_text_first=False
    )
    parts = [take(tensor, own, dim=2) for tensor in tensors(HEADS, NUM_IMAGE)]
    with pytest.raises(
        UnsupportedError, match=r"an attention mask of shape \(3, 7\) for . tokens of this"
    ):
        module(parts[0], key=parts[1], value=parts[2], attn_mask=torch.ones(3, 7, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="causal attention or dropout"):
        module(parts[0], key=parts[1], value=parts[2], is_causal=True)
    attention.detach()
    mesh.destroy()


def test_refuses_what_would_be_computed_wrongly(run_on_ranks):
    run_on_ranks(check_refusals, 2)
