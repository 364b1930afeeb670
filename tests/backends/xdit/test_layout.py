"""Arithmetic of shards and patches: every token is computed once, whatever the lengths."""

import itertools

import pytest
import torch

from backends.xdit.layout import Layout, sizes, take
from backends.xdit.tokens import _cut

LENGTHS = [(0, 16), (7, 25), (1, 3), (77, 1)]


def tokens_of(spans):
    return [token for start, stop in spans for token in range(start, stop)]


@pytest.mark.parametrize(("num_text", "num_image"), LENGTHS)
@pytest.mark.parametrize(("num_patches", "num_shards"), itertools.product([1, 3], [1, 2, 4]))
def test_shards_of_all_patches_cover_every_token_once(num_text, num_image, num_patches, num_shards):
    layout = Layout(
        num_text=num_text, num_image=num_image, num_patches=num_patches, num_shards=num_shards
    )
    shards = [
        layout.shard(index, patch=patch)
        for patch in range(num_patches)
        for index in range(num_shards)
    ]
    assert sorted(token for shard in shards for token in tokens_of(shard.text)) == list(
        range(num_text)
    )
    assert sorted(token for shard in shards for token in tokens_of(shard.image)) == list(
        range(num_image)
    )


@pytest.mark.parametrize(("num_text", "num_image"), LENGTHS)
def test_a_rank_has_the_same_shard_in_a_whole_pass_and_patch_by_patch(num_text, num_image):
    layout = Layout(num_text=num_text, num_image=num_image, num_patches=3, num_shards=2)
    whole = layout.shard(1)
    patches = [layout.shard(1, patch=patch) for patch in range(3)]
    assert tokens_of(whole.image) == [
        token for shard in patches for token in tokens_of(shard.image)
    ]
    assert tokens_of(whole.text) == [token for shard in patches for token in tokens_of(shard.text)]


def test_text_comes_with_the_first_patches_and_patches_are_even():
    layout = Layout(num_text=10, num_image=30, num_patches=4)
    assert [layout.patch(index) for index in range(4)] == [
        ((0, 10), (0, 0)),
        ((10, 10), (0, 10)),
        ((10, 10), (10, 20)),
        ((10, 10), (20, 30)),
    ]


def test_sizes_differ_by_one_at_most():
    assert sizes(7, 3) == [2, 2, 3]
    assert sizes(1, 3) == [0, 0, 1]


def test_take_concatenates_spans():
    assert take(torch.arange(10)[None], [(1, 3), (7, 8)], dim=1).tolist() == [[1, 2, 7]]


def test_an_entry_that_all_tokens_share_is_not_cut():
    positions = torch.ones(1, 8)
    for span in ((0, 16), (16, 32)):
        assert _cut(positions, (span,), 0) is positions
    assert _cut(torch.ones(2, 1, 8), ((0, 0),), 1).shape == (2, 0, 8)  # one token, on one rank
