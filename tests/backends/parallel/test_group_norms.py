"""Group norms in parts: torch's values, and no float32 copy of a whole activation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backends.parallel import group_norms
from backends.parallel.group_norms import moments, normalized

GROUPS = 8
SHAPES = [(2, 32, 24, 16), (1, 32, 384), (1, 16, 3, 8, 16)]


class Widest(TorchDispatchMode):
    """Notes the largest float32 result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float32:
                self.elements = max(self.elements, leaf.numel())
        return result


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    mean, var = moments(x.reshape(x.shape[0], GROUPS, -1))
    return normalized(x, mean, var, weight, bias, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
)
def test_parts_of_an_activation_are_normalised_as_torch_does(monkeypatch, shape, dtype, near):
    x = (3 * torch.randn(shape) + 1).to(dtype)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    want = F.group_norm(x.float(), GROUPS, weight.float(), bias.float())
    whole = norm(x, weight, bias)
    assert whole.dtype == dtype
    torch.testing.assert_close(whole.float(), want, atol=near, rtol=near)
    monkeypatch.setattr(group_norms, "MOST_WIDENED", x.numel() // 5)
    torch.testing.assert_close(norm(x, weight, bias), whole, atol=0, rtol=0)
    torch.testing.assert_close(norm(x, None, None), norm(x.clone(), None, None))


def test_no_float32_copy_is_made_of_a_whole_activation(monkeypatch):
    x = torch.randn(SHAPES[0]).half()
    monkeypatch.setattr(group_norms, "MOST_WIDENED", x.numel() // 4)
    with Widest() as widest:
        norm(x, torch.ones(32).half(), torch.zeros(32).half())
    assert widest.elements <= x.numel() // 4
