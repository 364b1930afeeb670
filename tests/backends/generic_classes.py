"""Runs pipeline classes without a row on one rank and on two, and says how far each is the same.

python -m tests.backends.generic_classes [CLASS ...] > results.jsonl  # all of diffusers: hours
python -m tests.backends.generic_classes --http=1 [CLASS ...] > results.jsonl  # through launchers
python -m tests.backends.generic_classes --page results.jsonl  # into docs/models.md

With DIFFUSERS_TESTS=FOLDER, the folder `tests` of a checkout of diffusers, components and sizes are
those of its own pipeline tests; without, what tests/checkpoints can put together.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from backends import backend_class, planner
from backends.asyncdiff.backend import AsyncDiffBackend
from backends.errors import ConfigError, PlanError
from backends.files.generic import (
    generic_spec,
)
from backends.files.pipeline_calls import exported_pipelines, pipeline_call
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.mesh import Mesh
from backends.model_table import ModelSpec, read_table
from backends.request import GenerateRequest, LoadRequest
from tests.backends.asyncdiff.runs import parameter_counts
from tests.backends.generic_http import over_http
from tests.backends.generic_page import Outcome, update_page
from tests.backends.generic_requests import (
    SEED,
    checkpoint_of,
    fields_of,
    guarded,
    largest_difference,
    plain_frames,
    reason_of,
)

WITHIN_S = 600
CAUSE_WITHIN_S = 2
NO_ANSWER = "no answer in time"
CHUNK = 15
"""Classes that two processes run one after the other."""
METHODS: Mapping[str, tuple[str, dict[str, object]]] = {
    "guidance": ("asyncdiff", {"use_cfg_parallel": True}),
    "segments": ("asyncdiff", {"use_cfg_parallel": False, "model_n": 2}),
    "sharded": ("asyncdiff", {"use_cfg_parallel": False, "model_n": 2, "shard_weights": True}),
    "tokens": ("xdit", {"ulysses_degree": 2}),
}
"""Name -> backend and its options on two ranks, all steps synchronous."""


def loaded(name: str, spec: ModelSpec) -> LoadedPipeline:
    load = LoadRequest(
        model_type=spec.name,
        checkpoint=str(checkpoint_of(name)),
        variant="fp32",
        parallel_vae=False,
    )
    with guarded(name):
        return load_pipeline(spec, load, device=torch.device("cpu"))


@contextmanager
def attached(pipe: LoadedPipeline, method: str, *, rank: int, world_size: int):
    name, options = METHODS[method]
    given = {**options, "checkpoint": pipe.load.checkpoint}
    plan = planner(name)(pipe.spec, given, world_size)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = backend_class(name)(spec=pipe.spec, plan=plan, mesh=mesh)
    if isinstance(backend, AsyncDiffBackend):
        backend.costs_of = parameter_counts
    pipe.attach(backend)
    try:
        yield backend
        pipe.detach()
    finally:
        mesh.destroy()


def spreads_tokens(pipe: LoadedPipeline) -> bool:
    """Return whether xdit can spread this pipeline over two ranks."""
    given = {**METHODS["tokens"][1], "checkpoint": pipe.load.checkpoint}
    try:
        planner("xdit")(pipe.spec, given, 2)
    except PlanError:
        return False
    return pipe.spec.supports("xdit").status != "unsupported"


def check_class(name: str, rank: int, world_size: int) -> Outcome:
    """Run one class by every method. All ranks call this alike."""
    spec = generic_spec(checkpoint_of(name))
    fields = fields_of(name, spec)
    request = GenerateRequest(**fields, seed=SEED, warmup_steps=100)
    pipe = loaded(name, spec)
    want = pipe.generate(request).frames
    outcome = Outcome(
        name=name, one_rank=largest_difference(want, plain_frames(name, spec, fields))
    )
    for method in METHODS if spec.denoisers else ():
        if method == "tokens" and not spreads_tokens(pipe):
            continue
        with attached(pipe, method, rank=rank, world_size=world_size) as backend:
            got = pipe.generate(request).frames
            if method == "guidance":
                outcome.split = "+".join(backend.report()["guidance"])
            elif method == "segments":
                pipe.generate(request.model_copy(update={"warmup_steps": 1}))
        outcome.two_ranks[method] = largest_difference(want, got)
    return outcome


def _rank(rank: int, world_size: int, folder: str, names: list[str]) -> None:
    """Write what each class gives. Each has a process group of its own: a failure breaks it, and
    the other rank fails with it.
    """
    torch.set_num_threads(1)
    for name in names:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{name}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=WITHIN_S),
        )
        try:
            text, kind = json.dumps(asdict(check_class(name, rank, world_size))), "json"
        except Exception as error:  # whatever a pipeline of diffusers raises
            text, kind = reason_of(error), "why"
        finally:
            dist.destroy_process_group()
        draft = Path(folder) / f"{name}.{rank}"
        draft.write_text(text)
        draft.rename(f"{draft}.{kind}")


def outcomes_of(names: list[str]) -> Iterator[Outcome]:
    """Run classes on two ranks in processes of their own; in new ones after one that ends them."""
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            context = mp.start_processes(
                _rank, (2, folder, left), nprocs=2, start_method="forkserver", join=False
            )
            for name in list(left):
                outcome = _outcome(name, Path(folder), context)
                yield outcome
                left.remove(name)
                if outcome.one_rank == NO_ANSWER or not _are_alive(context):
                    break
            for process in context.processes:
                process.kill() if left else process.join()


def _outcome(name: str, folder: Path, context: Any) -> Outcome:
    """Wait for what both ranks write about a class."""
    end = time.monotonic() + WITHIN_S
    while time.monotonic() < end:
        is_over = not _are_alive(context)
        reasons = sorted(folder.glob(f"{name}.?.why"))
        files = sorted(folder.glob(f"{name}.?.json"))
        if reasons:
            time.sleep(CAUSE_WITHIN_S)  # the other rank fails in turn, and may be seen first
            texts = [file.read_text() for file in sorted(folder.glob(f"{name}.?.why"))]
            return Outcome(name=name, one_rank=min(texts, key=lambda text: "gloo" in text))
        if len(files) == 2:
            both = [Outcome(**json.loads(file.read_text())) for file in files]
            return max(both, key=lambda one: json.dumps(one.two_ranks))
        if is_over:
            return Outcome(name=name, one_rank="its process died")
        time.sleep(0.1)
    return Outcome(name=name, one_rank=NO_ANSWER)


def _are_alive(context: Any) -> bool:
    return all(process.is_alive() for process in context.processes)


def classes() -> list[str]:
    """The pipeline classes of the installed diffusers."""
    return [name for name in exported_pipelines() if pipeline_call(name) is not None]


def buildable(name: str) -> str:
    """Return why no tiny checkpoint can be made and asked; empty if one can."""
    try:
        generic_spec(checkpoint_of(name))
    except ConfigError as error:
        return str(error).partition(", which ")[2].rstrip(".") or str(error)
    except LookupError:
        return "no tiny checkpoint"
    except Exception as error:  # whatever a constructor of diffusers raises
        return f"no tiny checkpoint ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return ""


def main(arguments: list[str]) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("names", nargs="*", metavar="CLASS", help="default: all of diffusers")
    options.add_argument("--http", type=int, metavar="RANKS", help="ask launchers of 1 or 2 ranks")
    options.add_argument("--together", action="store_true", help="one launcher for many classes")
    options.add_argument("--page", type=Path, metavar="RESULTS", help="write docs/models.md")
    given = options.parse_args(arguments)
    if given.page:
        update_page(given.page, classes(), tuple(METHODS))
        return
    for outcome in _walk(given.names or classes(), given.http, together=given.together):
        print(json.dumps(asdict(outcome)), flush=True)


def _walk(names: list[str], http_ranks: int | None, *, together: bool = False) -> Iterator[Outcome]:
    """Yield what each class gives: those that cannot be made, those without a row, the others."""
    rows = {spec.pipeline for spec in read_table().values()}
    reasons = {name: buildable(name) for name in names}
    yield from (Outcome(name=name, one_rank=why) for name, why in reasons.items() if why)
    able = sorted((name for name, why in reasons.items() if not why), key=rows.__contains__)
    if http_ranks:
        yield from over_http(able, http_ranks, together=together)
        return
    for start in range(0, len(able), CHUNK):
        yield from outcomes_of(able[start : start + CHUNK])


if __name__ == "__main__":
    mp.set_start_method("forkserver")
    mp.set_forkserver_preload(["diffusers", "transformers", "tests.backends.asyncdiff.runs"])
    main(sys.argv[1:])
