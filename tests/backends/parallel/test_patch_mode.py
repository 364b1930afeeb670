"""Where the operators of a patch are intercepted: at their modules, and nowhere between them."""

import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from backends.errors import UnsupportedError
from backends.groups.mesh import Axis, CommStats
from backends.groups.patch_exchange import FreshExchange
from backends.parallel import hooks
from backends.parallel.hooks import run_attention, with_attention
from backends.parallel.patch_bounds import PatchBounds, RowLayout
from backends.parallel.patch_mode import PatchMode

ROWS = RowLayout(PatchBounds((0, 8)), 8, patch=0)
"""One patch that is the whole image, so results are those of the plain network."""
SHAPE = (2, 4, 8, 8)


class Counting(FreshExchange):
    """Notes each kind of exchange."""

    def __init__(self) -> None:
        super().__init__(
            axis=Axis(name="patch", ranks=(0,), rank=0, group=None), traffic=CommStats()
        )
        self.kinds: list[str] = []

    def begin(self, kind, own, shapes):
        self.kinds.append(kind)
        return super().begin(kind, own, shapes)

    def gather(self, kind, own, shapes):
        self.kinds.append(kind)
        return super().gather(kind, own, shapes)


class Between(nn.Module):
    """Torch code between the operators, which notes the modes that it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(torch._C._len_torch_function_stack())
        return x * 2


class OwnConvolution(nn.Module):
    """Calls the operator itself, as some adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), Between(), *more)


def run(net: nn.Module, mode: PatchMode) -> tuple[list[str], Tensor]:
    exchange = Counting()
    with torch.no_grad(), mode.on(ROWS, exchange):
        return exchange.kinds, net(torch.ones(SHAPE).cumsum(-1))


def test_code_between_the_operators_runs_in_no_mode():
    net = network()
    mode = PatchMode(net)
    mode.attach()
    results = [run(net, mode) for _ in range(3)]
    mode.detach()
    want = net(torch.ones(SHAPE).cumsum(-1))
    assert net[2].modes == [1, 0, 0, 0]  # the first call is watched, the last one is plain
    for kinds, output in results:
        assert kinds == ["halo", "statistics"]
        torch.testing.assert_close(output, want)


def test_an_operator_outside_of_hooked_modules_is_found_and_stays_intercepted():
    net = network(OwnConvolution())
    mode = PatchMode(net)
    mode.attach()
    assert [run(net, mode)[0] for _ in range(3)] == [["halo", "statistics", "halo"]] * 3
    assert net[2].modes == [1, 1, 1]


def test_modules_that_came_later_are_hooked_and_watched():
    net = network()
    mode = PatchMode(net)
    mode.attach()
    run(net, mode)
    net.append(nn.Conv2d(4, 4, 3, padding=1))
    mode.refresh()
    assert [run(net, mode)[0] for _ in range(2)] == [["halo", "statistics", "halo"]] * 2
    assert net[2].modes == [1, 1, 0]
    mode.detach()
    assert not hooks.attached(net[3])


def test_a_convolution_whose_forward_is_replaced_keeps_that_forward():
    net = network()
    calls = []

    def offloaded(forward, *args):
        calls.append(len(args))
        return forward(*args)

    hooks.attach(net[0], "offload", offloaded)
    mode = PatchMode(net)
    mode.attach()
    assert [run(net, mode)[0] for _ in range(2)] == [["halo", "statistics"]] * 2
    assert calls == [1, 1]
    assert net[2].modes == [1, 0]


def test_attention_is_replaced_for_one_forward_in_one_thread():
    torchs_own = F.scaled_dot_product_attention
    query = torch.randn(1, 1, 4, 2)
    seen = []

    def attend(*args, **kwargs):
        seen.append("ours")
        return F.scaled_dot_product_attention(*args, **kwargs)  # torch's own here

    def forward():
        ours = F.scaled_dot_product_attention(query, query, query)
        thread = threading.Thread(
            target=lambda: seen.append(F.scaled_dot_product_attention(query, query, query))
        )
        thread.start()
        thread.join()
        return ours

    output = with_attention(attend, forward)
    assert seen[0] == "ours"
    assert len(seen) == 2
    torch.testing.assert_close(output, torchs_own(query, query, query))
    torch.testing.assert_close(seen[1], output)
    assert F.scaled_dot_product_attention is torchs_own


def test_attention_is_restored_after_an_error():
    torchs_own = F.scaled_dot_product_attention

    def fail():
        raise ValueError("of the module")

    with pytest.raises(ValueError, match="of the module"):
        with_attention(lambda *args: args[0], fail)
    assert F.scaled_dot_product_attention is torchs_own


def test_attention_module_is_run_without_its_search_for_arguments():
    torch.manual_seed(0)
    module = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4).eval()
    hidden, text = torch.randn(1, 5, 8), torch.randn(1, 3, 6)
    for args, kwargs in (((hidden, text), {}), ((hidden,), {"encoder_hidden_states": text})):
        with torch.no_grad():
            want = module(*args, **kwargs)
            assert torch.equal(run_attention(module, module.forward, *args, **kwargs), want)


def test_arguments_that_a_processor_may_not_know_go_to_the_module():
    module = Attention(query_dim=8, heads=2, dim_head=4)
    hidden = torch.randn(1, 5, 8)
    with torch.no_grad():
        want = module(hidden)
        got = run_attention(module, module.forward, hidden, unknown_argument=1)  # it drops them
    assert torch.equal(got, want)


def test_attention_that_bypasses_torchs_operator_is_refused():
    attention = Attention(query_dim=4, heads=1, dim_head=4, processor=AttnProcessor())
    net = nn.Sequential(attention)
    mode = PatchMode(net)
    mode.attach()
    layout = RowLayout(PatchBounds((0, 8)), 8, patch=0)
    said = "does not use torch's scaled_dot_product_attention"
    with pytest.raises(UnsupportedError, match=said), mode.on(layout, Counting()):
        net(torch.ones(2, 64, 4))
    mode.detach()
