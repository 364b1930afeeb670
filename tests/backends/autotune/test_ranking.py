"""What --backend=auto reckons with: ways to share an image, their predicted cost, and the choice
among them. No ranks, no torch.
"""

import json
from dataclasses import replace

import pytest

from backends import planner
from backends.autotune.candidates import list_candidates
from backends.autotune.cost import CFG_LOSS, Link, Work, predict
from backends.autotune.ranking import (
    CLOSE_CALL,
    Image,
    Measured,
    as_text,
    choose,
    contenders,
    next_to_try,
    rank,
    require_any,
)
from backends.errors import ConfigError
from backends.model_table import read_table
from backends.plan import ParallelPlan
from tests.checkpoints import checkpoint

TABLE = read_table()
FAST_LINK = Link(latency_s=2e-5, bytes_per_s=1e11)
UNET = Work(
    step_s=2.0, halves=2, weight_bytes=464_000_000, other_bytes=100_000_000,
    activation_bytes=200_000_000, latent_bytes=131_072,
    kv_bytes=69_206_016, hidden_bytes=3_145_728, num_attentions=34, halo_bytes=4_000_000,
    skip_bytes=15_000_000, num_convolutions=40,
    num_norms=60,
)  # fmt: skip


def candidates(type_name="sdxl", ranks=2, given=None, *, has_caches=False, **options):
    return list_candidates(TABLE[type_name], given or {}, ranks, has_caches=has_caches, **options)


def table(
    type_name="sdxl",
    ranks=2,
    *,
    work=UNET,
    link=FAST_LINK,
    quality="high",
    steps=None,
    memory=None,
    **options,
):
    measured = Measured(work=work, link=link, memory_bytes=memory, steps=steps or {})
    return rank(
        candidates(type_name, ranks, **options),
        measured,
        quality=quality,
        image=Image(num_steps=30),
    )


def named(rows, name):
    return next(row for row in rows if row.candidate.name == name)


def test_every_way_that_divides_the_ranks_is_there_once_and_has_its_plan():
    names = [candidate.name for candidate in candidates(ranks=4)]
    assert names[0] == "single" and len(set(names)) == len(names)
    assert {candidate.ranks for candidate in candidates(ranks=4)} == {1, 2, 4}
    assert {candidate.ranks for candidate in candidates(ranks=3)} == {1, 3}
    assert [name for name in names if name.endswith(" cfg 2")] == [
        "distrifuser cfg 2"
    ]  # asyncdiff's and xdit's are the same code
    for candidate in candidates(ranks=4):
        assert (
            candidate.plan.world_size == candidate.ranks
            and candidate.plan.method == candidate.backend
        )


def test_without_guidance_nothing_is_split_by_its_halves():
    assert not [
        candidate
        for candidate in candidates(ranks=4, is_guided=False)
        if candidate.plan.degree("cfg") > 1
    ]


def test_what_a_backend_or_the_table_refuses_stays_in_the_list_with_its_reason():
    found = {
        candidate.name: candidate
        for candidate in candidates("hy", 2, {"checkpoint": str(checkpoint("hy"))})
    }
    assert found["xdit pipefusion 2"].plan is None
    assert (
        "its later blocks read skip connections from earlier ones"
        in found["xdit pipefusion 2"].refusal
    )
    refusing = {"type_name": "chroma", "features": ("step_cache",)}
    found = {candidate.name: candidate for candidate in candidates(**refusing)}
    reason = "with divided tokens its cached steps differ"
    assert reason in found["xdit ulysses 2"].refusal
    assert reason in named(table(**refusing), "xdit ulysses 2").refusal


@pytest.mark.parametrize(
    ("name", "quality"),
    [
        ("distrifuser cfg 2 x patch 2 full_sync", "exact"),
        ("distrifuser cfg 2 x patch 2 corrected_async_gn", "high"),
        ("asyncdiff cfg 2 x segment 2 stride 1", "high"),
        ("asyncdiff segment 4 stride 1", "fast"),
        ("asyncdiff segment 3 stride 2", "fast"),
    ],
)
def test_quality_of_a_method_is_what_was_measured_of_it(name, quality):
    plans = {candidate.name: candidate.plan for candidate in candidates(ranks=4)}
    assert plans[name].quality == quality


def test_quality_leaves_out_what_is_less_strict_and_says_so():
    exact = table(ranks=4, quality="exact")
    assert {row.candidate.quality for row in exact if not row.refusal} == {"exact"}
    assert (
        named(exact, "asyncdiff segment 3 stride 2").refusal
        == "--quality=exact excludes it: it is fast"
    )
    assert (
        named(table(ranks=4, quality="high"), "asyncdiff segment 3 stride 2").refusal
        == "--quality=high excludes it: it is fast"
    )
    assert not named(table(ranks=4, quality="fast"), "asyncdiff segment 3 stride 2").refusal


def test_a_slower_link_never_makes_a_step_shorter():
    for candidate in candidates("sd3", 4) + candidates("sdxl", 4):
        links = [
            Link(latency_s=latency, bytes_per_s=speed)
            for latency, speed in ((1e-5, 1e11), (1e-4, 1e10), (1e-3, 1e9), (1e-2, 1e7))
        ]
        seconds = [predict(candidate.plan, UNET, link).step_s for link in links]
        assert seconds == sorted(seconds), candidate.name


def test_more_ranks_of_one_method_compute_less_and_send_no_less():
    for name in (
        "distrifuser patch {} corrected_async_gn",
        "distrifuser patch {} full_sync",
        "asyncdiff segment {} stride 1",
    ):
        estimates = [
            predict(c.plan, UNET, FAST_LINK)
            for c in candidates(ranks=8)
            for n in (2, 4, 8)
            if c.name == name.format(n)
        ]
        assert len(estimates) == 3
        assert [e.step_s for e in estimates] == sorted((e.step_s for e in estimates), reverse=True)
        assert [e.sent_bytes for e in estimates] == sorted(e.sent_bytes for e in estimates)


def test_bytes_sent_are_those_that_the_backends_count():
    """docs/distrifuser.md and docs/xdit.md: 37.2 MB for patches of the UNet, 37.7 MB for Ulysses
    and ring of the transformer.
    """
    patches = predict(
        next(c.plan for c in candidates() if c.name == "distrifuser patch 2 full_sync"),
        UNET,
        FAST_LINK,
    )
    assert patches.sent_bytes == pytest.approx(37.2e6, rel=0.05)
    transformer = replace(
        UNET, kv_bytes=2 * 8 * 1088 * 512 * 2 * 4, latent_bytes=2 * 16 * 64 * 64 * 4
    )
    for name in ("xdit ulysses 2", "xdit ring 2"):
        plan = next(c.plan for c in candidates("sd3") if c.name == name)
        assert predict(plan, transformer, FAST_LINK).sent_bytes == pytest.approx(37.7e6, rel=0.08)


def test_cfg_split_is_predicted_to_halve_a_guided_step_only():
    plan = next(c.plan for c in candidates() if c.name == "distrifuser cfg 2")
    assert predict(plan, UNET, FAST_LINK).step_s == pytest.approx(1.10, rel=0.01)
    assert predict(plan, replace(UNET, halves=1), FAST_LINK).step_s >= 2.0


def test_slow_links_fall_back_to_fewer_ranks():
    assert choose(table(ranks=4)).candidate.ranks == 4
    assert (
        choose(table(ranks=4, link=Link(latency_s=0.01, bytes_per_s=3e6))).candidate.ranks == 2
    )  # the halves of guidance hardly talk
    assert (
        choose(table(ranks=4, link=Link(latency_s=5.0, bytes_per_s=1e5))).candidate.name == "single"
    )
    assert (
        choose(table(ranks=4, link=Link(latency_s=5.0, bytes_per_s=1e5)), ranks=4).candidate.ranks
        == 4
    )


def test_what_does_not_fit_the_memory_is_refused_with_both_sizes():
    rows = table("sd3", memory=700_000_000, quality="fast")
    assert (
        named(rows, "single").refusal
        == "it needs about 0.8 GB on each rank, but only 0.7 GB are available"
    )
    assert not named(rows, "xdit ulysses 2").refusal
    assert choose(rows).candidate.ranks == 2
    with pytest.raises(
        ConfigError,
        match=(
            r"no method is left for --backend=auto \(.*single: it needs about 0.8 GB.*Ask for a "
            r"smaller"
        ),
    ):
        require_any(table(memory=1000))


def test_measured_time_beats_predicted_time():
    steps = {"single": 2.0, "distrifuser cfg 2": 1.4, "asyncdiff segment 2 stride 1": 1.1}
    assert choose(table()).candidate.name == "distrifuser cfg 2"
    assert choose(table(steps=steps)).candidate.name == "asyncdiff segment 2 stride 1"
    assert (
        choose(table(steps={"single": 2.0, "distrifuser cfg 2": 2.5})).candidate.name == "single"
    )  # more ranks are slower
    assert (
        choose(table(steps={"single": 2.0})).candidate.ranks == 2
    )  # nothing else was tried: then the prediction counts


def test_in_a_close_call_the_stricter_method_wins():
    steps = {
        "single": 2.0,
        "distrifuser cfg 2": 1.0,
        "distrifuser patch 2 corrected_async_gn": 0.98,
    }
    assert choose(table(steps=steps)).candidate.name == "distrifuser cfg 2"
    steps["distrifuser patch 2 corrected_async_gn"] = 0.5 / CLOSE_CALL
    assert choose(table(steps=steps)).candidate.name == "distrifuser patch 2 corrected_async_gn"


def test_the_quickest_are_tried_again_if_they_are_close():
    steps = {"single": 2.0, "distrifuser cfg 2": 1.0, "asyncdiff segment 2 stride 1": 1.1}
    assert [candidate.name for candidate in contenders(table(steps=steps))] == [
        "distrifuser cfg 2",
        "asyncdiff segment 2 stride 1",
    ]
    assert not contenders(table(steps=steps | {"asyncdiff segment 2 stride 1": 1.9}))
    assert not contenders(table(steps={"single": 2.0}))


def test_only_what_may_be_the_quickest_is_tried_and_what_failed_is_not_tried_again():
    first = next_to_try(table(steps={"single": 2.0}))
    assert first.name == "distrifuser cfg 2"
    assert next_to_try(table(steps={"single": 2.0, first.name: 0.1})) is None
    measured = Measured(
        work=UNET,
        link=FAST_LINK,
        steps={"single": 2.0},
        failures={first.name: "PlanError: too small"},
    )
    rows = rank(candidates(), measured, quality="high", image=Image(num_steps=30))
    assert named(rows, first.name).refusal == "it was tried and failed: PlanError: too small"
    assert next_to_try(rows).name not in ("single", first.name)


def test_synchronous_steps_count_in_the_time_of_a_image():
    row = named(table(ranks=2), "distrifuser patch 2 corrected_async_gn")
    estimate = row.estimate
    assert row.image_s == pytest.approx(4 * estimate.synchronous_s + 26 * estimate.step_s)
    assert estimate.image_s(2) == pytest.approx(2 * estimate.synchronous_s)


def test_table_explains_the_choice_and_every_refusal():
    rows = table(
        "hy",
        2,
        steps={"single": 2.0, "xdit cfg 2": 1.0},
        given={"checkpoint": str(checkpoint("hy"))},
    )
    text = as_text(rows, choose(rows))
    assert len(text) == len(rows) + 1
    assert next(line for line in text if line.startswith("*")).split()[1:5] == [
        "xdit",
        "cfg",
        "2",
        "2",
    ]
    assert "measured" in text[1] and any("predicted" in line for line in text)
    assert any("its later blocks read skip connections" in line for line in text)
    facts = [row.facts() for row in rows]
    assert json.loads(json.dumps(facts)) == facts
    assert {
        "method",
        "ranks",
        "quality",
        "predicted_step_s",
        "measured_step_s",
        "image_s",
        "memory_mb",
    } <= set(facts[0])


def test_what_was_measured_is_kept_as_json():
    measured = Measured(
        work=UNET, link=FAST_LINK, memory_bytes=10**9, steps={"single": 2.0}, failures={"a": "b"}
    )
    assert Measured.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_stages_keep_a_part_of_the_weights_but_load_all_of_them():
    plan = next(c.plan for c in candidates("sd3") if c.name == "xdit pipefusion 2")
    estimate = predict(plan, UNET, FAST_LINK)
    assert estimate.load_bytes == UNET.weight_bytes + UNET.other_bytes
    assert estimate.run_bytes < predict(ParallelPlan(method="single"), UNET, FAST_LINK).run_bytes
    segments = planner("asyncdiff")
    whole, sharded = (
        predict(segments(TABLE["sd1"], {"shard_weights": shards}, 2), UNET, FAST_LINK).run_bytes
        for shards in (False, True)
    )
    assert whole - sharded == UNET.weight_bytes / 2


def test_stages_wait_for_a_whole_prediction_beside_a_data_axis_and_not_beside_guidance_halves():
    plan = next(c.plan for c in candidates("sd3", 4) if c.name == "xdit cfg 2 x pipefusion 2")
    beside_data = replace(
        plan,
        axes=tuple(
            ("data" if name == "cfg" else name, degree)
            for name, degree in plan.axes
            if name != "data"
        ),
    )
    alone = replace(plan, axes=(("stage", 2),))
    half, both = replace(UNET, step_s=UNET.step_s / 2, halves=1), replace(UNET, halves=1)
    assert predict(plan, UNET, FAST_LINK).step_s == pytest.approx(
        CFG_LOSS * predict(alone, half, FAST_LINK).step_s, rel=0.01
    )
    # four patches through two stages, of which one waits for a fifth of the step
    assert predict(beside_data, both, FAST_LINK).step_s == pytest.approx(
        5 / 4 * predict(alone, both, FAST_LINK).step_s, rel=0.01
    )


def test_memory_of_a_plan_includes_its_communicators():
    plan = ParallelPlan(method="xdit", axes=(("cfg", 2), ("ulysses", 2)))
    small, large = (
        predict(plan, UNET, replace(FAST_LINK, communicator_bytes=size)).memory_bytes
        for size in (0, 10**10)
    )
    assert large - small == pytest.approx(3 * 10**10)  # cfg, ulysses, and both
