"""A tensor whose patches are on their way: the same numbers as torch's, no patch asked for before
it is needed.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from backends.groups.collectives import all_gather
from backends.groups.mesh import Axis
from backends.xdit.pending import Deferred, PatchGrid, PendingTensor

SPANS = ((0, 5), (5, 11), (11, 24))
MAP, TOKENS = (
    (4, 6, 8, 12),
    (4, 24, 6),
)  # 4 x 6 tokens of 2 x 2 pixels: patches begin and end within rows


class Source:
    """A PendingTensor of random numbers; `asked`: the patches that were waited for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.grid = PatchGrid.of(self.whole, SPANS, 2)
        self.asked: list[int] = []
        self.arriving = PendingTensor(
            [Deferred(self._piece(patch)) for patch in range(3)],
            self.grid,
            self.whole,
            self.whole.device,
        )

    def _piece(self, patch):
        def take() -> Tensor:
            self.asked.append(patch)
            return self.grid.take(self.whole, patch)

        return take


@pytest.fixture(params=[MAP, TOKENS], ids=["map", "tokens"])
def source(request):
    return Source(request.param)


def guided_step(prediction: Tensor, sample: Tensor) -> Tensor:
    """What a pipeline does between two calls of its denoiser."""
    without, with_text = prediction.chunk(2)
    guided = without + torch.tensor(7.5) * (with_text - without)
    change = guided.chunk(2, dim=1 if prediction.dim() == 4 else 2)[0]
    stepped = (sample.to(torch.float32) - (1 - 0.25 * change) / torch.tensor(3.0)).to(
        torch.bfloat16
    )
    return torch.cat([stepped] * 2)


def sample_for(prediction: Tensor) -> Tensor:
    channels = 1 if prediction.dim() == 4 else 2
    return torch.ones_like(prediction.chunk(2)[0].chunk(2, dim=channels)[0])


def test_arithmetic_waits_for_no_patch_and_gives_what_torch_gives(source):
    sample = sample_for(source.whole)
    got = guided_step(source.arriving, sample)
    want = guided_step(source.whole, sample)
    assert isinstance(got, PendingTensor) and (got.shape, got.dtype, source.asked) == (
        want.shape,
        want.dtype,
        [],
    )
    sample.zero_()  # what it was counts
    got.fill(1)
    assert (
        source.asked == [1]
        and got.buffer.count_nonzero() == source.grid.take(want, 1).count_nonzero() > 0
    )
    assert torch.equal(got.whole(), want) and sorted(source.asked) == [0, 1, 2]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.flip(0),
        lambda x: x.flatten(1),
        lambda x: x[:1, 1:],
        lambda x: x.sum(1),
        lambda x: torch.cat([x, x], dim=-1),
    ],
)
def test_everything_else_waits_for_all_patches(source, other):
    got = other(source.arriving)
    assert (
        type(got) is Tensor
        and torch.equal(got, other(source.whole))
        and sorted(source.asked) == [0, 1, 2]
    )


def test_operands_that_cannot_be_cut_into_patches_make_it_wait(source):
    per_row = torch.randn(source.whole.shape[-1])
    got = source.arriving * per_row
    assert type(got) is Tensor and torch.equal(got, source.whole * per_row)


def test_it_is_decoded_and_turned_into_numpy_like_any_tensor():
    source = Source(MAP)
    kernel = torch.randn(3, 6, 3, 3)
    assert torch.equal(
        functional.conv2d(source.arriving / 2, kernel), functional.conv2d(source.whole / 2, kernel)
    )
    assert (Source(MAP).arriving.float().numpy() == source.whole.numpy()).all()


def test_changing_it_in_place_changes_what_comes_after_and_not_what_came_before(source):
    before = source.arriving * 2
    source.arriving.mul_(3)
    after = source.arriving + 1
    assert torch.equal(after, source.whole * 3 + 1) and torch.equal(
        before.whole(), source.whole * 2
    )


def test_changing_a_part_of_it_in_place_is_refused(source):
    with pytest.raises(
        RuntimeError, match=r"would change a part of a prediction in place.* Clone the part first"
    ):
        source.arriving.chunk(2)[0].add_(1)
    assert torch.equal(source.arriving.chunk(2)[0].clone().add_(1), source.whole.chunk(2)[0] + 1)


def test_gathering_it_gives_both_halves_and_waits_for_none(source):
    other = Source(source.whole.shape)
    source.arriving.gathered = torch.cat([source.arriving, other.arriving])
    got = all_gather(
        source.arriving, dim=0, axis=Axis(name="cfg", ranks=(0, 1), rank=0, group=None)
    )
    assert isinstance(got, PendingTensor) and source.asked == other.asked == []
    assert torch.equal(got.whole(), torch.cat([source.whole, other.whole]))
    assert (
        all_gather(source.arriving, dim=0, axis=Axis(name="data", ranks=(0,), rank=0, group=None))
        is source.arriving
    )


def test_a_image_of_other_tokens_has_no_patches():
    assert PatchGrid.of(torch.zeros(1, 4, 8, 10), SPANS, 2) is None
    assert PatchGrid.of(torch.zeros(1, 23, 6), SPANS, 1) is None
    assert PatchGrid.of(torch.zeros(1, 4, 1, 8, 12), SPANS, 2) is None
