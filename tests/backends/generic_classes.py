"""Runs pipeline classes without a row on one rank and on two, and says how far each is the same.

python -m tests.backends.generic_classes [CLASS ...] > results.jsonl  # all of diffusers: hours
python -m tests.backends.generic_classes --page results.jsonl  # writes docs/models.md
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from backends.asyncdiff.backend import AsyncDiffBackend
from backends.asyncdiff.plan import make_plan
from backends.errors import ConfigError
from backends.files.generic import carrier, generic_spec
from backends.files.pipeline_calls import exported_pipelines, pipeline_call
from backends.generation.generic_run import frames_of
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.mesh import Mesh
from backends.model_table import ModelSpec, read_table
from backends.request import GenerateRequest, LoadRequest
from tests.backends.asyncdiff.runs import parameter_counts
from tests.checkpoints import sample_image
from tests.checkpoints.variants import variant

SIZE, STEPS, SEED = 64, 4, 3
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
WITHIN_S = 300
CHUNK = 6
"""Classes that two processes run one after the other."""
METHODS = {
    "guidance": {"use_cfg_parallel": True},
    "segments": {"use_cfg_parallel": False, "model_n": 2},
    "sharded": {"use_cfg_parallel": False, "model_n": 2, "shard_weights": True},
}
"""Name -> options of asyncdiff on two ranks, all steps synchronous."""


@dataclass(kw_only=True)
class Outcome:
    """Largest differences in levels of 255, or the reason why there is none."""

    name: str
    one_rank: float | str = "not run"
    """Against plain diffusers."""
    two_ranks: dict[str, float | str] = field(default_factory=dict)
    """Method of METHODS -> against one rank."""
    split: str = ""
    """How the CFG split divides it: batch, calls or whole."""

    @property
    def is_right(self) -> bool:
        figures = (self.one_rank, *self.two_ranks.values())
        return all(isinstance(figure, int | float) and figure <= 1 for figure in figures)


def fields_of(spec: ModelSpec) -> dict[str, Any]:
    """Return a small request with everything that the class takes."""
    mask = Image.new("RGB", (SIZE, SIZE), "black")
    mask.paste("white", (0, 0, SIZE, SIZE // 2))
    asked: dict[str, Any] = {
        "prompt": "a photo of a cat",
        "negative_prompt": "a dog",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "height": SIZE,
        "width": SIZE,
        "num_frames": 5,
        "image": sample_image(SIZE),
        "mask_image": mask,
        "control_image": sample_image(SIZE, seed=1),
        "strength": 0.6,
    }
    return {name: value for name, value in asked.items() if name in spec.takes}


def loaded(name: str, spec: ModelSpec) -> LoadedPipeline:
    load = LoadRequest(
        model_type=spec.name, checkpoint=str(variant(name)), variant="fp32", parallel_vae=False
    )
    return load_pipeline(spec, load, device=torch.device("cpu"))


def plain_frames(name: str, spec: ModelSpec, fields: dict[str, Any]) -> np.ndarray:
    """uint8 (N, H, W, 3) of diffusers' own pipeline, called with the same values."""
    import diffusers

    pipe = getattr(diffusers, spec.pipeline).from_pretrained(variant(name), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        spec.guidance_argument
        if name == "guidance_scale"
        else carrier(spec.parameters, name): value
        for name, value in fields.items()
    }
    if "max_area" in spec.parameters:
        arguments["max_area"] = SIZE * SIZE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        output = pipe(**arguments, generator=torch.Generator().manual_seed(SEED), output_type="np")
    return frames_of(output, spec.output)


@contextmanager
def attached(pipe: LoadedPipeline, options: dict[str, object], *, rank: int, world_size: int):
    plan = make_plan(pipe.spec, options, world_size)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = AsyncDiffBackend(spec=pipe.spec, plan=plan, mesh=mesh)
    backend.costs_of = parameter_counts
    pipe.attach(backend)
    try:
        yield backend
        pipe.detach()
    finally:
        mesh.destroy()


def largest_difference(one: np.ndarray, two: np.ndarray) -> float:
    if one.shape != two.shape:
        return float("inf")
    return float(np.abs(one.astype(int) - two.astype(int)).max())


def check_class(name: str, rank: int, world_size: int) -> Outcome:
    """Run one class by every method. All ranks call this alike."""
    spec = generic_spec(variant(name))
    fields = fields_of(spec)
    request = GenerateRequest(**fields, seed=SEED, warmup_steps=100)
    pipe = loaded(name, spec)
    want = pipe.generate(request).frames
    outcome = Outcome(
        name=name, one_rank=largest_difference(want, plain_frames(name, spec, fields))
    )
    for method, options in METHODS.items():
        with attached(pipe, options, rank=rank, world_size=world_size) as backend:
            got = pipe.generate(request).frames
            if method == "guidance":
                outcome.split = "+".join(backend.report()["guidance"])
            elif method == "segments":
                pipe.generate(request.model_copy(update={"warmup_steps": 1}))
        outcome.two_ranks[method] = largest_difference(want, got)
    return outcome


def _rank(rank: int, world_size: int, folder: str, names: list[str]) -> None:
    """Write what each class gives. The first failure ends the process: its groups may be broken."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=WITHIN_S),
    )
    for name in names:
        try:
            outcome = check_class(name, rank, world_size)
        except BaseException as error:
            (Path(folder) / f"{rank} {name}").write_text(_reason(error))
            raise
        (Path(folder) / f"{rank} {name}.json").write_text(json.dumps(asdict(outcome)))


def _reason(error: BaseException) -> str:
    trace = traceback.extract_tb(error.__traceback__)
    places = [each for each in trace if "/backends/" in each.filename] or list(trace)
    where = f"{Path(places[-1].filename).name}:{places[-1].lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]} ({where})"


def outcomes_of(names: list[str]) -> Iterator[Outcome]:
    """Run classes on two ranks in processes of their own; in new ones after one that fails."""
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            _run_until_failure(folder, left)
            for name in list(left):
                files = [Path(folder) / f"{rank} {name}.json" for rank in range(2)]
                if not all(file.is_file() for file in files):
                    break
                both = [Outcome(**json.loads(file.read_text())) for file in files]
                left.remove(name)
                yield max(both, key=lambda one: json.dumps(one.two_ranks))
            if left:
                name = left.pop(0)
                reasons = [file.read_text() for file in sorted(Path(folder).glob(f"? {name}"))]
                reason = reasons[0] if reasons else "no answer in time"
                yield Outcome(name=name, one_rank=reason)


def _run_until_failure(folder: str, names: list[str]) -> None:
    context = mp.start_processes(
        _rank, (2, folder, names), nprocs=2, start_method="forkserver", join=False
    )
    try:
        while not context.join():
            pass
    except Exception:  # the ranks' own files say what happened
        for process in context.processes:
            process.kill()


def classes() -> list[str]:
    """The pipeline classes of the installed diffusers."""
    return [name for name in exported_pipelines() if pipeline_call(name) is not None]


def buildable(name: str) -> str:
    """Return why no tiny checkpoint can be made and asked; empty if one can."""
    try:
        generic_spec(variant(name))
    except ConfigError as error:
        return str(error).partition(", which ")[2].rstrip(".") or str(error)
    except LookupError:
        return "no tiny checkpoint"
    except Exception as error:  # whatever a constructor of diffusers raises
        return f"no tiny checkpoint ({type(error).__name__})"
    return ""


HEAD = """# Pipeline classes without a row

Generated by `python -m tests.backends.generic_classes --page RESULTS`. A checkpoint folder whose
pipeline class has no row in `model_table.yaml` runs as diffusers has it (`--type=generic`, or no
`--type`). `python launcher.py --list --all` prints the classes, what each makes, and which fields
of a request it takes.

**What is compared.** Tiny checkpoints with random weights, float32, 4 steps, on the CPU with gloo.
*One rank*: against plain diffusers, called with the same values. *Guidance*, *segments*,
*sharded*: two ranks against one: the CFG split, AsyncDiff with all steps synchronous, and the same
with each rank keeping only its segment's weights. The numbers are the largest difference in levels
of 255. *Split* says how the two halves of guidance come: in one `batch`, in two `calls`, or not in
two equal halves (`whole`), which every rank computes alike. Nothing was measured on a GPU, and no
published checkpoint was loaded.
"""


def page(results: list[Outcome]) -> str:
    """Return docs/models.md."""
    ran = [one for one in results if one.two_ranks]
    right = [one for one in ran if one.is_right]
    failed = [one for one in results if not one.two_ranks]
    lines = [
        HEAD,
        f"Of {len(classes())} pipeline classes {len(ran)} were compared, and {len(right)} of them "
        "are equal within one level everywhere.\n",
        "| class | one rank | guidance | segments | sharded | split |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(ran, key=lambda one: one.name):
        figures = " | ".join(_shown(one.two_ranks.get(method, "")) for method in METHODS)
        lines.append(f"| {one.name} | {_shown(one.one_rank)} | {figures} | {one.split} |")
    if failed:
        lines += ["\n## Not compared, and why\n", "| class | reason |", "|---|---|"]
        lines += [f"| {one.name} | {str(one.one_rank).replace('|', 'or')} |" for one in failed]
    return "\n".join(lines) + "\n"


def _shown(figure: float | str) -> str:
    return f"{figure:g}" if isinstance(figure, int | float) else figure


def main(names: list[str]) -> None:
    if names[:1] == ["--page"]:
        lines = Path(names[1]).read_text(encoding="utf-8").splitlines()
        results = [Outcome(**json.loads(line)) for line in lines]
        PAGE.write_text(page(results), encoding="utf-8")
        return
    rows = {spec.pipeline for spec in read_table().values()}
    reasons = {name: buildable(name) for name in names or classes()}
    for name, reason in reasons.items():
        if reason:
            print(json.dumps(asdict(Outcome(name=name, one_rank=reason))), flush=True)
    able = sorted((name for name, reason in reasons.items() if not reason), key=rows.__contains__)
    for start in range(0, len(able), CHUNK):
        for outcome in outcomes_of(able[start : start + CHUNK]):
            print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    mp.set_start_method("forkserver")
    main(sys.argv[1:])
