"""Compares the choice of `--backend=auto` for the benchmark networks with all measured methods.

    python -m benchmarks.planner --sides 32,48,64 > planner.json

For each network (unet, dit), size of the latents, with and without guidance, on 1 and 2 ranks of
one thread: the planner does what it does when a host loads (backends/autotune/trials.py: survey one
rank, predict, try the best predicted). Then every method is measured in the same way, the fastest
ones `--rounds` times, and the planner's choice is compared with the fastest (`ratio`, by seconds
per image of `--image_steps` steps; `ratio_of_prediction`: had it chosen by prediction alone).
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from backends.autotune.candidates import list_candidates
from backends.autotune.cost import as_json
from backends.autotune.ranking import Image, Measured, Row, choose, rank
from backends.autotune.trials import WARMUP_STEPS, Trials
from backends.generation.pipeline import OnStep
from backends.groups.control_group import gather_outcomes
from backends.model_table import read_table
from backends.parallel.base import Backend, RunInfo
from backends.plan import QUALITIES
from backends.request import GenerateRequest
from backends.step_cache_spec import StepCacheSpec
from benchmarks.models import GUIDANCE, SUBJECTS, Subject, num_parameters

LOOP_STEPS = 20
CLOSE = 1.3
"""After the first round, only methods within this factor of the fastest are measured again."""


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(
                _rank, (arguments, folder), nprocs=arguments.ranks, start_method="spawn"
            )
        finally:  # partial results, too, if it is interrupted
            print(Path(folder, "result.json").read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default="unet,dit", help=f"with commas, of {', '.join(SUBJECTS)}"
    )
    parser.add_argument("--sides", default="32,48,64", help="sides of the latents, with commas")
    parser.add_argument("--guidance", default="on,off")
    parser.add_argument("--quality", choices=QUALITIES, default="high")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="measurements of a method, of which the quickest counts",
    )
    parser.add_argument("--image_steps", type=int, default=30)
    return parser.parse_args()


def _rank(number: int, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=arguments.ranks
    )
    cases = []
    try:
        with torch.no_grad():
            for model in arguments.models.split(","):
                for side in map(int, arguments.sides.split(",")):
                    for guidance in arguments.guidance.split(","):
                        cases.append(
                            measure(
                                number,
                                arguments,
                                model=model,
                                side=side,
                                is_guided=guidance == "on",
                            )
                        )
                        if number == 0:
                            _tell(cases[-1])
                            _write(Path(folder, "result.json"), arguments, cases)
    finally:
        dist.destroy_process_group()


class BenchmarkSubject:
    """A benchmark network for backends/autotune/trials.py.

    A loop of guided steps replaces the pipeline.
    """

    def __init__(self, subject: Subject, *, is_guided: bool) -> None:
        self.device = torch.device("cpu")
        self.denoiser = getattr(subject.pipe, read_table()[subject.model_type].denoiser)
        self.other_bytes = 0
        self._subject = subject
        self._backend: Backend | None = None
        request = GenerateRequest(
            num_inference_steps=LOOP_STEPS,
            guidance_scale=GUIDANCE if is_guided else 1.0,
            warmup_steps=WARMUP_STEPS,
        )
        size = subject.sample.shape[-1] * 8
        self._run = RunInfo(
            request=request, height=size, width=size, num_inference_steps=LOOP_STEPS
        )

    def attach(self, backend: Backend, step_cache: StepCacheSpec | None = None) -> None:
        assert step_cache is None  # the networks run without a pipeline, which attaches caches
        backend.attach(self._subject.pipe)
        self._backend = backend

    def detach(self) -> None:
        if self._backend is not None:
            self._backend.detach(self._subject.pipe)
            self._backend = None

    def run(self, on_step: OnStep) -> None:
        scheduler, sample = self._subject.pipe.scheduler, self._subject.sample
        scheduler.set_timesteps(LOOP_STEPS)
        self._backend.check(self._run)
        self._backend.begin(self._run)
        try:
            for index, timestep in enumerate(scheduler.timesteps):
                sample = scheduler.step(
                    self._subject.predict(sample, timestep), timestep, sample, return_dict=False
                )[0]
                self._backend.step_done()
                on_step(index + 1, LOOP_STEPS, sample)
        finally:
            self._backend.end()


def measure(
    number: int, arguments: argparse.Namespace, *, model: str, side: int, is_guided: bool
) -> dict[str, Any]:
    """Measure one network at one size. Every rank returns the same."""
    subject = SUBJECTS[model](side=side, is_guided=is_guided)
    spec = read_table()[subject.model_type]
    candidates = list_candidates(spec, {}, arguments.ranks, is_guided=is_guided, has_caches=False)
    trials = Trials(
        BenchmarkSubject(subject, is_guided=is_guided),
        spec=spec,
        rank=number,
        world_size=arguments.ranks,
        halves=2 if is_guided else 1,
    )
    started = time.perf_counter()
    measured = trials.measure(
        candidates,
        quality=arguments.quality,
        image=Image(num_steps=arguments.image_steps),
    )
    probe_s = time.perf_counter() - started
    best: dict[str, float] = {}
    for _ in range(arguments.rounds):
        limit_s = CLOSE * min(best.values(), default=float("inf"))
        for candidate in candidates:
            if candidate.plan is not None and best.get(candidate.name, 0.0) <= limit_s:
                step_s, failure = (
                    trials.trial(candidate) if candidate.ranks > 1 else (trials.alone().step_s, "")
                )
                best[candidate.name] = min(
                    best.get(candidate.name, float("inf")), float("inf") if failure else step_s
                )
    denoiser = getattr(subject.pipe, spec.denoiser)
    case = {
        "model": model,
        "latents": side,
        "guidance": is_guided,
        "parameters": num_parameters(denoiser),
    }
    best = {name: step_s for name, step_s in best.items() if step_s < float("inf")}
    return gather_outcomes(
        case | {"probe_s": round(probe_s, 2)} | _compare(arguments, candidates, measured, best)
    )[0]


def _compare(
    arguments: argparse.Namespace,
    candidates: list[Any],
    measured: Measured,
    truth: dict[str, float],
) -> dict[str, Any]:
    """Return the choice and the best method, by seconds per image."""
    options = {"quality": arguments.quality, "image": Image(num_steps=arguments.image_steps)}
    by_planner = rank(candidates, measured, **options)
    predicted = rank(candidates, Measured(work=measured.work, link=measured.link), **options)
    true_rows = rank(
        candidates, Measured(work=measured.work, link=measured.link, steps=truth), **options
    )
    able = {
        row.candidate.name: row
        for row in true_rows
        if not row.refusal and row.measured_s is not None
    }
    best = min(able.values(), key=lambda row: row.image_s)
    chosen, guessed = _name(choose(by_planner)), _name(choose(predicted))
    alone = [row for row in by_planner if row.candidate.ranks == 1]
    return {
        "choice_on_one_rank": _name(choose(alone)),
        "choice": chosen,
        "choice_by_prediction": guessed,
        "best": best.candidate.name,
        "ratio": round(able[chosen].image_s / best.image_s, 3),
        "ratio_of_prediction": round(able[guessed].image_s / best.image_s, 3),
        "link": as_json(measured.link),
        "work": as_json(measured.work),
        "methods": [_method(row, measured) for row in true_rows if row.estimate is not None],
    }


def _method(row: Row, measured: Measured) -> dict[str, Any]:
    """Return a row of the result: prediction and measurement."""
    tried_s, predicted_s = measured.steps.get(row.candidate.name), row.estimate.step_s
    return {
        "method": row.candidate.name,
        "quality": row.quality,
        "predicted_step_s": round(predicted_s, 4),
        "tried_step_s": None if tried_s is None else round(tried_s, 4),
        "measured_step_s": None if row.measured_s is None else round(row.measured_s, 4),
        "predicted_over_measured": None
        if row.measured_s is None
        else round(predicted_s / row.measured_s, 3),
        "image_s": round(row.image_s, 2),
        "sent_mb": round(row.estimate.sent_bytes / 1e6, 2),
    }


def _name(row: Row | None) -> str:
    assert row is not None
    return row.candidate.name


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **vars(arguments),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }


def _tell(case: dict[str, Any]) -> None:
    name = f"{case['model']} {case['latents']} guidance {'on' if case['guidance'] else 'off'}"
    print(
        f"{name}: {case['choice']}, best {case['best']}, ratio {case['ratio']}",
        file=sys.stderr,
        flush=True,
    )


def _write(file: Path, arguments: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    worst = {key: max(case[key] for case in cases) for key in ("ratio", "ratio_of_prediction")}
    file.write_text(
        json.dumps({"machine": _machine(arguments), "worst": worst, "cases": cases}, indent=1)
    )


if __name__ == "__main__":
    main()
