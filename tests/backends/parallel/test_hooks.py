"""Attach and detach on module instances."""

import pytest
import torch
from torch import nn

from backends.parallel import hooks


def test_the_last_attached_is_the_outermost_and_detaching_restores_the_forward() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    plain = module(x)
    hooks.attach(module, "double", lambda forward, *args: 2 * forward(*args))
    hooks.attach(module, "add", lambda forward, *args: forward(*args) + 1)
    assert torch.equal(module(x), 2 * plain + 1)
    assert hooks.attached(module) == ["double", "add"]
    hooks.detach(module, "add")
    assert torch.equal(module(x), 2 * plain)
    hooks.detach(module, "double")
    assert torch.equal(module(x), plain)
    assert not {"forward", "_attached_forwards"} & set(module.__dict__)


def test_other_instances_of_the_class_are_not_touched() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    hooks.attach(one, "zero", lambda forward, *args: torch.zeros(1))
    assert other(torch.ones(1, 2)).shape == (1, 2)


def test_refuses_the_same_name_twice_and_detaching_out_of_order() -> None:
    module = nn.Linear(2, 2)
    hooks.attach(module, "a", lambda forward, *args: forward(*args))
    with pytest.raises(ValueError, match="'a' is already attached"):
        hooks.attach(module, "a", lambda forward, *args: forward(*args))
    hooks.attach(module, "b", lambda forward, *args: forward(*args))
    with pytest.raises(ValueError, match="'a' is not the outermost"):
        hooks.detach(module, "a")
