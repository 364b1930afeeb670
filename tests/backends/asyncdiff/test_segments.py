"""Where the cuts fall, for made-up costs."""

import pytest

from backends.asyncdiff.segments import Segments, choose_segments
from backends.asyncdiff.units import Layout, Unit
from backends.errors import PlanError


def chain(num_bytes, skips=()):
    """Units that each read the one before; skips: (from, to) pairs besides."""
    units = []
    for index, size in enumerate(num_bytes):
        reads = {(index - 1, 0)} if index else set()
        reads |= {(start, 0) for start, stop in skips if stop == index}
        units.append(Unit(name=f"unit{index}", reads=frozenset(reads), leaf_bytes=(size,)))
    return Layout(units=tuple(units), output_reads=frozenset({(len(num_bytes) - 1, 0)}))


def test_the_largest_segment_is_as_small_as_possible():
    segments = choose_segments(chain([8] * 6), [5, 1, 1, 1, 1, 1], 2)
    assert segments.bounds == (0, 1, 6)
    assert choose_segments(chain([8] * 6), [3, 3, 1, 1, 1, 4], 3).bounds[1:] != (3, 5, 6)


def test_among_equal_cuts_the_fewest_bytes_win():
    costs = [10.0, 0.01, 0.01, 10.0]
    assert choose_segments(chain([64, 64, 4, 64]), costs, 2).bounds == (0, 3, 4)
    assert choose_segments(chain([4, 64, 64, 64]), costs, 2).bounds == (0, 1, 4)


def test_a_slower_rank_gets_less():
    assert choose_segments(chain([8] * 10), [1.0] * 10, 2, (1.0, 0.25)).bounds == (0, 8, 10)


def test_imports_are_the_tensors_that_cross_a_cut():
    segments = Segments(chain([8] * 4, skips=[(0, 3)]), (0, 2, 4))
    assert segments.imports(0) == ()
    assert segments.imports(1) == ((0, 0), (1, 0))


def test_a_result_made_of_an_early_unit_is_imported_by_the_last_segment():
    layout = chain([8] * 4)
    layout = Layout(units=layout.units, output_reads=frozenset({(3, 0), (0, 0)}))
    assert Segments(layout, (0, 2, 4)).imports(1) == ((0, 0), (1, 0))


def test_rejects_more_segments_than_units():
    with pytest.raises(
        PlanError,
        match=r"model_n=5 is not possible: this model has 4 units. Use at most 4 segments.",
    ):
        choose_segments(chain([8] * 4), [1.0] * 4, 5)


def test_the_table_names_every_unit_and_the_share_of_every_segment():
    text = Segments(chain([8] * 4), (0, 1, 4)).table([0.003, 0.001, 0.001, 0.001])
    assert all(f"unit{index}" in text for index in range(4))
    assert (
        "segment 0: 1 units, 50.0% of the time" in text
        and "segment 1: 3 units, 50.0% of the time" in text
    )
