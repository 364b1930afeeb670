"""--backend=auto: when it is on, what it decides before anything is loaded, what it remembers; and
on two ranks, from load to image.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from backends import backend_class
from backends.autotune.cost import Link
from backends.autotune.ranking import Image, Measured
from backends.autotune.trials import PipelineSubject, Trials
from backends.errors import ConfigError
from backends.generation.pipeline import load_pipeline
from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import Mesh
from backends.model_table import read_table
from backends.request import GenerateRequest
from hosts.launch.auto_backend import candidates_of, recall_from, remember
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from hosts.ranks.autotune import measure_again, tune
from hosts.ranks.warmup import prewarm_request
from hosts.supervision.progress import Activity
from tests.checkpoints import checkpoint

TABLE = read_table()


def start(type_name="sdxl", ranks=2, *, measured=None, num_gpus=0, **options):
    settings = Settings.from_values(
        {"type": type_name, "checkpoint": str(checkpoint(type_name)), **options}
    )
    return plan_start(
        settings, TABLE, num_gpus=num_gpus, num_ranks=ranks, recall=lambda key: measured
    )


def with_steps(found, **changes):
    """What a launch would have measured: the estimate's work, and steps by name."""
    known = {
        "work": found.auto.measured.work,
        "link": found.auto.measured.link,
        "steps": {},
        "date": "2026-01-01",
    }
    return Measured(**{**known, **changes})


def test_several_ranks_without_a_word_on_the_method_choose_it():
    found = start()
    assert found.auto is not None and found.plan == found.auto.world.candidate.plan
    assert found.reasons[0].startswith(f"method={found.auto.job.candidate.name}: ")
    assert found.reasons[0].endswith(
        "estimated from the checkpoint's configuration; measured once it is loaded"
    )
    assert found.facts()["planner"]["choice"] == found.auto.job.candidate.name
    assert json.loads(json.dumps(found.facts()))["planner"]["table"][0]["method"]


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 1},
        {"ranks": 1, "backend": "auto"},
        {"backend": "distrifuser"},
        {"sync_mode": "full_sync"},
        {"model_n": 2},
        {"compile_unet": True},
        {"mode": "throughput"},
        {"mode": "throughput", "backend": "auto"},
    ],
    ids=str,
)
def test_what_settles_the_method_otherwise_leaves_nothing_to_choose(options):
    found = start(**options)
    assert found.auto is None and "planner" not in found.facts()
    assert found.plan.method == ("single" if options.get("ranks") == 1 else "distrifuser")


@pytest.mark.parametrize("options", [{}, {"backend": "auto"}])
def test_one_rank_chooses_among_step_caches_where_the_image_need_not_be_exact(options):
    found = start(ranks=1, quality="high", **options)
    assert found.auto.job.candidate.name == "single + prediction,2"
    assert start(ranks=1, quality="fast").auto.job.candidate.name == "single + prediction,3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_n": 2},
            "--backend=auto chooses degrees and modes itself, but --model_n was given. Leave "
            "that out, or name the backend: asyncdiff.",
        ),
        (
            {"compile_unet": True},
            "--backend=auto benchmarks several methods on the loaded model, and with "
            "--compile_unet each would compile it again. "
            "Leave it out, or name the backend: distrifuser or asyncdiff or xdit.",
        ),
    ],
)
def test_auto_is_refused_together_with_what_it_decides(options, message):
    with pytest.raises(ConfigError) as caught:
        start(backend="auto", **options)
    assert str(caught.value) == message


def test_measured_times_decide_the_plan_of_all_ranks_and_of_teams():
    steps = {
        "single": 1.0,
        "distrifuser cfg 2": 0.9,
        "asyncdiff segment 4 stride 1": 0.3,
        "asyncdiff segment 2 stride 1": 0.6,
    }
    found = start(ranks=4, measured=with_steps(start(ranks=4), steps=steps), quality="fast")
    assert (found.plan.method, found.plan.degree("segment"), found.plan.options["model_n"]) == (
        "asyncdiff",
        4,
        4,
    )
    assert {size: plan.method for size, plan in found.teams.plans.items()} == {
        1: "single",
        2: "asyncdiff",
    }
    assert found.teams.mode == "auto" and found.load.prewarm_steps == 1
    assert found.auto.source == "measured 2026-01-01"


def test_fewer_ranks_are_used_where_more_are_slower_and_the_others_take_jobs_of_their_own():
    steps = {"single": 1.0, "distrifuser cfg 2": 1.5, "asyncdiff segment 2 stride 1": 2.0}
    found = start(measured=with_steps(start(), steps=steps))
    assert (found.teams.mode, {size: plan.method for size, plan in found.teams.plans.items()}) == (
        "throughput",
        {1: "single"},
    )
    assert (found.facts()["backend"], found.facts()["exactness"], found.plan.world_size) == (
        "single",
        "exact",
        2,
    )
    assert (
        "mode=throughput: more than 1 of 2 ranks are slower, so they work in teams of 1"
        in found.facts()["reasons"]
    )
    together = start(measured=with_steps(start(), steps=steps), mode="latency")
    assert together.auto.job.candidate.name == "distrifuser cfg 2" and not together.teams.plans


def test_quality_and_features_limit_the_choice():
    steps = {"single": 1.0, "distrifuser cfg 2": 0.9, "asyncdiff segment 2 stride 1": 0.3}
    assert (
        start(measured=with_steps(start(), steps=steps), quality="exact").plan.describe()
        == "distrifuser: cfg 2 (exact)"
    )
    cached = start(measured=with_steps(start(), steps=steps), step_cache="deep,2")
    refusals = {row.candidate.name: row.refusal for row in cached.auto.rows}
    assert (
        "step_cache=deep,2 is not available with segments"
        in refusals["asyncdiff segment 2 stride 1"]
    )
    assert (
        refusals["distrifuser patch 2 corrected_async_gn"]
        == "--quality=exact excludes it: it is high"
    )
    assert not refusals["distrifuser cfg 2"]


def test_nothing_that_fits_is_one_error_with_everyones_reason():
    said = (
        r"no method is left for --backend=auto \(.*it needs about .* GB on each rank, but only "
        r"0\.0 GB are available.*Ask for a smaller size"
    )
    with pytest.raises(ConfigError, match=said):
        start(measured=with_steps(start(), memory_bytes=1000))
    failures = {"xdit ring 3": "PlanError: no", "xdit ulysses 3": "PlanError: no"}
    said = (
        r"no method uses all 3 ranks \(.*--quality=exact excludes it.*Start fewer with "
        r"--nproc_per_node"
    )
    with pytest.raises(ConfigError, match=said):
        start(
            "zimage",
            ranks=3,
            mode="latency",
            measured=with_steps(start("zimage", ranks=3), failures=failures),
        )
    measured = with_steps(start("zimage", ranks=3), failures=failures)
    teams = start("zimage", ranks=3, measured=measured)
    assert (teams.teams.mode, set(teams.teams.plans)) == ("throughput", {1})


def test_attention_that_replaces_torchs_own_has_no_effect_and_says_so():
    found = start(enable_attention_slicing=True)
    assert not found.load.enable_attention_slicing
    assert any(
        reason.startswith("--enable_attention_slicing has no effect with --backend=auto")
        for reason in found.reasons
    )


def test_a_slow_link_makes_fewer_ranks_the_choice_before_anything_is_measured():
    found = start(measured=with_steps(start(), link=Link(latency_s=10.0, bytes_per_s=1e3)))
    assert found.auto.job.candidate.name == "single" and found.facts()["backend"] == "single"


def test_memory_of_a_launch_fits_only_the_same_launch(tmp_path):
    found = start()
    remember(tmp_path, found.auto.key, found.auto.measured)
    assert recall_from(tmp_path)(found.auto.key) == found.auto.measured
    assert recall_from(None)(found.auto.key) is None
    for other in (
        start(ranks=4),
        start(variant="bf16"),
        start(height=64),
        start(quality="fast"),
        start("sd1"),
        start(num_gpus=2),
    ):
        assert other.auto.key != found.auto.key
    assert start(port=7001, mode="latency").auto.key == found.auto.key
    next((tmp_path / "plans").glob("*.json")).write_text('{"work": 1}')
    assert recall_from(tmp_path)(found.auto.key) is None


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path):
    (tmp_path / "plans").write_text("in the way")
    remember(tmp_path, "key", start().auto.measured)


def check_settling(rank, world_size, folder):
    """Measured once, remembered then; and the chosen method draws what it draws when it is
    named.
    """
    options = {"height": 64, "width": 64, "mode": "latency", "quality": "exact"}
    place = {
        "folder": folder,
        "rank": rank,
        "world_size": world_size,
        "device": torch.device("cpu"),
        "activity": Activity(),
    }
    settled, pipeline = tune(
        start(**options), lambda measured: start(measured=measured, **options), **place
    )
    assert settled.auto.source.startswith("measured 20") and pipeline is not None
    tried = [row for row in settled.auto.rows if row.measured_s is not None]
    assert {"single", "distrifuser cfg 2"} <= {
        row.candidate.name for row in tried
    } and settled.auto.job in tried
    assert all(row.measured_s > 0 for row in tried)
    again, nothing = tune(
        start(**options), lambda measured: start(measured=measured, **options), **place
    )
    assert nothing is None and again.facts() == settled.facts()
    chosen = settled.auto.job.candidate
    named = start(
        backend=chosen.backend,
        **options,
        **{name: value for name, value in chosen.options.items() if value is not False},
    )
    assert named.auto is None and (named.plan.axes, named.plan.options) == (
        settled.plan.axes,
        settled.plan.options,
    )
    request = GenerateRequest(prompt="a red circle", seed=3, num_inference_steps=3)
    sample_images = []
    for plan in (settled.plan, named.plan):
        mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
        pipeline.attach(backend_class(plan.method)(spec=settled.spec, plan=plan, mesh=mesh))
        sample_images.append(pipeline.generate(request).frames)
        pipeline.detach()
        mesh.destroy()
    assert np.array_equal(*sample_images) and sample_images[0].std() > 0


def test_two_ranks_measure_once_then_remember_and_draw_what_the_named_method_draws(
    run_on_ranks, tmp_path
):
    run_on_ranks(check_settling, 2, tmp_path)


SEGMENTS, BANDS = "asyncdiff segment 2 stride 1", "distrifuser patch 2 corrected_async_gn"


def check_closeness(rank, world_size, folder):
    """What is measured of images is kept with the times, and decides between levels."""
    options = {"height": 64, "width": 64, "quality": "fast"}
    found = start(**options)
    found = start(
        measured=with_steps(found, steps={"single": 1.0, SEGMENTS: 0.4, BANDS: 0.5}), **options
    )
    pipeline = load_pipeline(found.spec, found.load, device=torch.device("cpu"))
    place = {"rank": rank, "world_size": world_size, "alarm": None, "folder": folder}
    few = {"must_end": lambda: True}
    measured = measure_again(found, pipeline, with_closeness=True, **few, **place)
    assert measured.steps[SEGMENTS] == 0.4 and 0 < measured.steps["single"] < 1.0
    assert set(measured.closeness) == {SEGMENTS, BANDS, f"{BANDS}, no extrapolation"}
    assert all(5 < decibels < 150 for decibels in measured.closeness.values())
    assert measured.closeness[BANDS] != measured.closeness[f"{BANDS}, no extrapolation"]
    assert gather_outcomes(measured.closeness) == [measured.closeness] * world_size
    again = measure_again(found, pipeline, with_closeness=False, **few, **place)
    assert again.closeness == {} and recall_from(folder)(found.auto.key) is not None
    rows = {row.candidate.name: row for row in start(measured=measured, **options).auto.rows}
    assert rows[SEGMENTS].closeness_db == measured.closeness[SEGMENTS]
    assert rows[SEGMENTS].facts()["closeness_db"] == round(measured.closeness[SEGMENTS], 1)


def test_closeness_of_each_method_is_measured_by_an_image(run_on_ranks, tmp_path):
    run_on_ranks(check_closeness, 2, tmp_path)


def test_whether_to_extrapolate_is_decided_by_what_was_measured():
    twin = f"{BANDS}, no extrapolation"
    for better in (BANDS, twin):
        closeness = {BANDS: 44.0, twin: 44.0, better: 47.0}
        found = start(
            measured=with_steps(start(), steps={"single": 1.0, BANDS: 0.3}, closeness=closeness),
            quality="high",
        )
        assert found.auto.levels["high"] == better
        asked = found.methods.of_size[2][better].plan.options["extrapolate"]
        assert asked is (False if better == twin else None)


def check_failing_method(rank, world_size):
    """A method that fails on one rank in a trial is left out with its reason, and the others are
    tried.
    """
    found = start(height=64, width=64)
    pipeline = load_pipeline(found.spec, found.load, device=torch.device("cpu"))
    request = prewarm_request(found.spec, replace(found.load, prewarm_steps=20))
    subject = PipelineSubject(pipeline, request, request)
    attach = subject.attach

    def fail_on_one_rank(backend, step_cache=None):
        if backend.plan.describe().startswith("distrifuser: cfg 2") and rank == 1:
            raise RuntimeError("this rank cannot")
        attach(backend, step_cache)

    subject.attach = fail_on_one_rank
    trials = Trials(subject, spec=found.spec, rank=rank, world_size=world_size, halves=2)
    measured = trials.measure(candidates_of(found.auto), quality="exact", image=Image(num_steps=20))
    assert measured.failures["distrifuser cfg 2"] == "RuntimeError: this rank cannot"
    assert "single" in measured.steps and "distrifuser cfg 2" not in measured.steps
    other = next(
        candidate
        for candidate in candidates_of(found.auto)
        if candidate.name == "distrifuser patch 2 full_sync"
    )
    step_s, failure = trials.trial(other)
    assert (failure, step_s > 0) == ("", True)


def test_a_method_that_fails_in_its_trial_is_left_out_with_the_reason(run_on_ranks):
    run_on_ranks(check_failing_method, 2)


def check_slow_steps(rank, world_size):
    found = start(height=64, width=64)
    pipeline = load_pipeline(found.spec, found.load, device=torch.device("cpu"))
    request = prewarm_request(found.spec, replace(found.load, prewarm_steps=20))
    subject = PipelineSubject(pipeline, request, request)
    trials = Trials(subject, spec=found.spec, rank=rank, world_size=world_size, halves=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backends.autotune.trials.SLOW_STEP_S", 0.0)  # every step is slow
        measured = trials.measure(
            candidates_of(found.auto), quality="exact", image=Image(num_steps=20), also=["high"]
        )
    assert (measured.steps.keys(), measured.failures) == ({"single"}, {})
    chosen = start(height=64, width=64, measured=measured).auto
    assert chosen.levels["exact"] != "single", "the estimate still decides"


def test_methods_are_not_tried_on_a_cpu_that_takes_long_for_a_step(run_on_ranks):
    run_on_ranks(check_slow_steps, 2)
