"""Which of a host's methods generates a request, by its quality, steps, guidance and size."""

from dataclasses import replace

import pytest

from backends.autotune.ranking import Image, rank
from backends.errors import ConfigError, UnsupportedError
from backends.plan import FEW_STEPS
from hosts.launch.auto_backend import candidates_of
from hosts.launch.methods import Methods
from tests.hosts.launch.test_auto_backend import start, with_steps

STEPS = {
    "single": 1.0,
    "distrifuser cfg 2": 0.6,
    "asyncdiff segment 2 stride 1": 0.45,
    "distrifuser cfg 2 + deep,2": 0.4,
    "distrifuser cfg 2 + deep,3": 0.3,
}
GUIDED = {"pixels": 1.0, "halves": 2}


def chosen(**changes):
    estimated = start()
    work = replace(estimated.auto.measured.work, step_s=STEPS["single"])
    return start(measured=with_steps(estimated, steps=STEPS, work=work, **changes))


def methods(**changes):
    return chosen(**changes).methods


def first(found, quality, num_steps=30, ranks=2, **image):
    return found.names(quality, ranks=ranks, num_steps=num_steps, **{**GUIDED, **image})[0]


def test_each_quality_has_its_quickest_method_and_exact_is_the_default():
    found = methods()
    assert first(found, None) == first(found, "exact") == "distrifuser cfg 2"
    assert first(found, "high") == "distrifuser cfg 2 + deep,2"
    assert first(found, "fast") == "distrifuser cfg 2 + deep,3"
    assert first(found, "exact", ranks=1) == "single"


def test_with_few_steps_high_allows_no_stale_values_and_no_cache():
    found = methods()
    assert first(found, "high", FEW_STEPS - 1) == "distrifuser cfg 2"
    assert first(found, "high", FEW_STEPS) == "distrifuser cfg 2 + deep,2"
    assert first(found, "fast", 4) == "distrifuser cfg 2 + deep,3"


def test_without_guidance_a_split_of_its_halves_gains_nothing():
    found = methods()
    assert first(found, "fast", halves=1) == "asyncdiff segment 2 stride 1"
    assert "distrifuser cfg 2" in found.names("exact", ranks=2, num_steps=30, pixels=1.0, halves=1)


def test_measured_closeness_overrules_what_was_known_of_a_method():
    close = {"distrifuser cfg 2 + deep,2": 38.0, "distrifuser cfg 2 + deep,3": 41.0}
    found = methods(closeness=close)
    assert first(found, "high") == "distrifuser cfg 2 + deep,3"
    found = methods(closeness={"distrifuser cfg 2 + deep,3": 20.0})
    assert first(found, "fast") == "distrifuser cfg 2 + deep,2"


def test_another_size_is_reckoned_with_what_was_measured_of_this_one():
    found = chosen()
    sizes = [1.0, 4.0]
    times = [
        {
            row.candidate.name: row.image_s
            for row in rank(
                candidates_of(found.auto),
                found.auto.measured,
                quality="fast",
                image=Image(num_steps=30, pixels=pixels),
            )
        }
        for pixels in sizes
    ]
    assert times[0]["single"] == 30.0
    for name in ("single", "distrifuser cfg 2"):
        assert times[1][name] == pytest.approx(4 * times[0][name], rel=0.1)


def test_a_quality_that_no_method_of_all_ranks_has_is_an_error_that_names_them():
    found = methods()
    segments = found.of_size[2]["asyncdiff segment 2 stride 1"]
    only = replace(found, of_size={2: {segments.name: segments}})
    with pytest.raises(
        UnsupportedError, match="quality='exact' is not available on 2 ranks of this host with 4"
    ):
        only.names("exact", ranks=2, num_steps=4, **GUIDED)


def test_a_quality_that_the_named_method_lacks_is_refused_at_start():
    with pytest.raises(ConfigError) as caught:
        start(backend="asyncdiff", quality="exact")
    assert str(caught.value).startswith(
        "--quality=exact is not available with asyncdiff: segment 2 (approximate), which is high."
    )
    assert start(backend="asyncdiff", quality="high").plan.method == "asyncdiff"
    assert start(ranks=1, quality="exact").plan.method == "single"


def test_a_named_method_generates_whatever_is_asked():
    found = start(backend="asyncdiff").methods
    assert found.names("high", ranks=2, num_steps=30, **GUIDED) == ("asyncdiff",)


def test_one_rank_is_quickest_where_more_are_slower_at_that_quality():
    found = methods()
    assert found.quickest(None, (1, 2), num_steps=30, **GUIDED) == 2
    slow = {name: 1.5 for name in STEPS if name != "single"}
    measured = replace(found.measured, steps={**slow, "single": 1.0})
    assert (
        replace(found, measured=measured, _best={}).quickest(
            "exact", (1, 2), num_steps=30, **GUIDED
        )
        == 1
    )
    assert start(backend="asyncdiff").methods.quickest(None, (1, 2), num_steps=4, **GUIDED) == 2


def test_measured_seconds_are_known_for_images_of_the_measured_kind_only():
    found, one = methods(), {"ranks": 2, "num_steps": 10}
    assert found.measured_s("distrifuser cfg 2", **one, **GUIDED) == pytest.approx(6.0)
    assert found.measured_s("distrifuser cfg 2", **one, pixels=4.0, halves=2) is None
    assert found.measured_s("distrifuser cfg 2", **one, pixels=1.0, halves=1) is None
    assert found.measured_s("another", **one, **GUIDED) is None
    assert Methods.named().measured_s("single", ranks=1, num_steps=10, **GUIDED) is None
