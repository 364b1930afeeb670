"""Methods that keep a part of the denoiser on each rank read no other: same images, and no more
memory than that part.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends import backend_class, planner
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.mesh import Mesh
from backends.parallel.weight_shards import (
    TRIM_EVERY_BYTES,
    full_bytes,
    release_memory,
    weight_bytes,
)
from backends.request import LoadRequest
from benchmarks.loading import private_bytes
from tests.backends.features import (
    CPU,
    TABLE,
    Feature,
    combined,
    feature,
    num_graphs,
    prepare,
    request_for,
    result,
)
from tests.checkpoints import checkpoint, lora

STAGES = ("xdit", {"pipefusion_parallel_degree": 2})
TENSOR = ("xdit", {"tensor_parallel_degree": 2})
UNET_TENSOR = ("distrifuser", {"parallelism": "tensor", "no_split_batch": True})
SEGMENTS = ("asyncdiff", {"shard_weights": True})
LARGE = {
    "num_layers": 40,
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "caption_projection_dim": 256,
}
"""A transformer of 190 MB in bfloat16, almost all of it in 40 blocks."""
SLACK_BYTES = TRIM_EVERY_BYTES + 20_000_000
"""For everything but weights: what glibc may keep until it is told to give it back, and groups,
activations and Python.
"""

Way = tuple[str, Mapping[str, object]]


def load(
    name: str,
    *,
    is_cut: bool,
    variant: str = "bf16",
    adapters: Mapping[str, object] | None = None,
    **config: object,
) -> LoadedPipeline:
    request = LoadRequest(
        model_type=name,
        checkpoint=str(checkpoint(name, **config)),
        variant=variant,
        parallel_vae=False,
        **(adapters or {}),
    )
    return load_pipeline(TABLE[name], request, device=CPU, is_cut=is_cut)


def attach(pipe: LoadedPipeline, way: Way, rank: int, size: int) -> Mesh:
    backend, options = way
    given = {**options, "checkpoint": pipe.load.checkpoint}
    mesh = Mesh(planner(backend)(pipe.spec, given, size), rank=rank, device=CPU)
    pipe.attach(backend_class(backend)(spec=pipe.spec, plan=mesh.plan, mesh=mesh))
    return mesh


def check_image(
    rank: int, size: int, name: str, way: Way, given: Feature, requests: Sequence[Mapping[str, Any]]
) -> None:
    images: list[list[torch.Tensor]] = []
    for is_cut in (False, True):
        pipe = load(name, is_cut=is_cut, adapters=given.load)
        mesh = attach(pipe, way, rank, size)
        images.append(
            [result(pipe, request_for(pipe.spec, **given.request, **fields)) for fields in requests]
        )
        assert (num_graphs() > 0) == ("compile" in given.load)
        pipe.detach()
        denoiser = getattr(pipe.pipe, pipe.spec.denoiser)
        assert weight_bytes(denoiser) == full_bytes(denoiser)
        mesh.destroy()
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=0)
    assert all(not torch.equal(*pair) for pair in itertools.pairwise(images[1]))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("sd3", STAGES),
        ("sdxl", SEGMENTS),
        pytest.param("sd3", SEGMENTS, marks=pytest.mark.slow),
        pytest.param("flux", TENSOR, marks=pytest.mark.slow),
        pytest.param("sdxl", UNET_TENSOR, marks=pytest.mark.slow),
        pytest.param("flux", STAGES, marks=pytest.mark.slow),
    ],
)
def test_the_image_is_that_of_weights_that_were_read_whole_and_then_cut(
    run_on_ranks: Callable[..., None], name: str, way: Way
) -> None:
    prepare(TABLE[name], [])
    run_on_ranks(check_image, 2, name, way, Feature(), [{}])


def changed_biases(name: str, folder: Path) -> str:
    """Write a LoRA file that changes the biases of all blocks, and return its path."""
    part = TABLE[name].denoiser
    weights = load_file(checkpoint(name) / part / "diffusion_pytorch_model.safetensors")
    changes = {
        f"{part}.{key.removesuffix('bias')}diff_b": 0.3 * torch.randn(weight.shape)
        for key, weight in weights.items()
        if key.endswith(".bias") and "block" in key
    }
    save_file(changes, folder / "biases.safetensors")
    return str(folder / "biases.safetensors")


@pytest.mark.parametrize(
    ("name", "way", "names"),
    [
        ("sd3", STAGES, ["lora", "ip_adapter"]),
        ("sdxl", SEGMENTS, ["lora", "ip_adapter"]),
        # LoRAs are fused before their layers are cut
        ("flux", TENSOR, ["lora"]),
        pytest.param("sdxl", UNET_TENSOR, ["lora"], marks=pytest.mark.slow),
        pytest.param("sd3", SEGMENTS, ["lora"], marks=pytest.mark.slow),
        pytest.param("flux", STAGES, ["lora"], marks=pytest.mark.slow),
        # LoRAs are fused before compiling
        ("sd3", STAGES, ["lora", "compile"]),
        pytest.param("sdxl", SEGMENTS, ["lora", "compile"], marks=pytest.mark.slow),
        pytest.param("pixa", SEGMENTS, ["lora", "compile"], marks=pytest.mark.slow),
    ],
)
def test_adapters_given_at_launch_act_on_weights_that_are_read_after_them(
    run_on_ranks: Callable[..., None], name: str, way: Way, names: list[str], tmp_path: Path
) -> None:
    prepare(TABLE[name], names)
    given = combined(names, TABLE[name])
    loras = {**given.load["lora"], changed_biases(name, tmp_path): 0.5}
    given = replace(given, load={**given.load, "lora": loras})
    # the other methods refuse it to change adapters once the weights are cut, and all when fused
    is_changeable = way is STAGES and "compile" not in names
    requests = [{}, {"lora": {}}, {}] if is_changeable else [{}]
    run_on_ranks(check_image, 2, name, way, given, requests)


@pytest.mark.parametrize(
    ("name", "way"),
    [("flux", STAGES), pytest.param("pixa", SEGMENTS, marks=pytest.mark.slow)],
)
def test_compiled_parts_of_the_denoiser_are_read_after_they_were_hooked(
    run_on_ranks: Callable[..., None], name: str, way: Way
) -> None:
    given = feature("compile", TABLE[name])
    prepare(TABLE[name], [])
    run_on_ranks(check_image, 2, name, way, given, [{}])


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list whose one item is the largest growth of private memory so far, in bytes."""
    release_memory()
    before, peak, is_done = private_bytes(), [0], threading.Event()

    def sample() -> None:
        while not is_done.wait(0.002):
            peak[0] = max(peak[0], private_bytes() - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        is_done.set()
        sampler.join()


def large_dora(folder: Path) -> str:
    """Write a DoRA on the widest layer of each of LARGE's blocks, and return its path."""
    weights = load_file(
        checkpoint("sd3", **LARGE) / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    keys = {}
    for name, weight in weights.items():
        if name.endswith(".ff.net.0.proj.weight"):
            layer = f"transformer.{name.removesuffix('.weight')}"
            keys[f"{layer}.lora_A.weight"] = torch.ones(1, weight.shape[1])
            keys[f"{layer}.lora_B.weight"] = torch.ones(weight.shape[0], 1)
            keys[f"{layer}.dora_scale"] = weight.float().norm(dim=1, keepdim=True)
    assert len(keys) == 3 * LARGE["num_layers"]
    save_file(keys, folder / "dora.safetensors")
    return str(folder / "dora.safetensors")


def check_memory(rank: int, size: int, way: Way, dora: str, is_compiled: bool) -> None:
    options = feature("compile", TABLE["sd3"]).load if is_compiled else {}
    # what a first image, a first adapter and a first graph allocate
    pipe = load(
        "sd3", is_cut=False, adapters={**options, "lora": {str(lora("sd3", style="dora")): 1}}
    )
    mesh = attach(pipe, way, rank, size)
    result(pipe, request_for(TABLE["sd3"]))
    mesh.destroy()
    del pipe
    with peak_memory() as peak:
        adapters = {**options, **({"lora": {dora: 1}} if dora else {})}
        pipe = load("sd3", is_cut=True, adapters=adapters, **LARGE)
        mesh = attach(pipe, way, rank, size)
        if not is_compiled:  # 40 blocks of graphs take memory besides
            result(pipe, request_for(pipe.spec))
    whole, kept = full_bytes(pipe.pipe.transformer), weight_bytes(pipe.pipe.transformer)
    block = full_bytes(pipe.pipe.transformer.transformer_blocks[0])
    parts = [part for part in pipe.pipe.components.values() if isinstance(part, torch.nn.Module)]
    small = sum(full_bytes(part) for part in parts) - whole
    assert kept < 0.6 * whole
    assert peak[0] < kept + block + small + SLACK_BYTES < whole + small, (peak, kept, whole)
    mesh.destroy()


@pytest.mark.parametrize(
    ("way", "adapter"),
    [
        (STAGES, ""),
        (STAGES, "dora"),
        (STAGES, "fused dora"),
        (SEGMENTS, "fused dora"),
        # a minute each on CPUs without instructions for bfloat16
        pytest.param(SEGMENTS, "", marks=pytest.mark.slow),
        pytest.param(SEGMENTS, "dora", marks=pytest.mark.slow),
    ],
)
def test_a_rank_never_holds_more_than_its_part_and_one_block(
    run_on_ranks: Callable[..., None], way: Way, adapter: str, tmp_path: Path
) -> None:
    lora("sd3", style="dora")
    checkpoint("sd3", **LARGE)
    dora = large_dora(tmp_path) if adapter else ""
    run_on_ranks(check_memory, 2, way, dora, adapter.startswith("fused"))
