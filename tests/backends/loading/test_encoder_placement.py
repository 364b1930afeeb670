"""Text encoders on some of the ranks: the same images, and no weights elsewhere."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from backends import backend_class, planner
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.mesh import Mesh
from backends.parallel.weight_shards import move, weight_bytes
from backends.request import LoadRequest
from tests.backends.features import CPU, TABLE, Feature, combined, prepare, request_for, result
from tests.checkpoints import checkpoint


def load(name: str, rank: int, size: int, **fields: object) -> LoadedPipeline:
    request = LoadRequest(
        model_type=name,
        checkpoint=str(checkpoint(name)),
        variant="fp32",
        parallel_vae=False,
        **fields,
    )
    return load_pipeline(TABLE[name], request, device=CPU, share=(rank, size))


def held(pipe: LoadedPipeline) -> list[int]:
    """Bytes of each text encoder on this rank."""
    encoders = [getattr(pipe.pipe, f"text_encoder{end}", None) for end in ("", "_2", "_3")]
    return [weight_bytes(encoder) for encoder in encoders if encoder is not None]


def check_placement(rank: int, size: int, name: str, kind: str, features: list[str]) -> None:
    spec = TABLE[name]
    case = combined(features, spec) if features else Feature()
    asked = request_for(spec, **case.request)
    options = {"use_cfg_parallel": True, "checkpoint": str(checkpoint(name))}
    mesh = Mesh(planner("xdit")(spec, options, size), rank=rank, device=CPU)
    images = {}
    for placement in ("every", kind):
        pipe = load(name, rank, size, encoder_placement=placement, **case.load)
        pipe.attach(backend_class("xdit")(spec=spec, plan=mesh.plan, mesh=mesh))
        images[placement] = [result(pipe, asked), result(pipe, asked)]
        assert pipe._prompts.num_hits or "compel" in features
        pipe.detach()
    for whole, placed in zip(*images.values(), strict=True):
        torch.testing.assert_close(placed, whole, rtol=0, atol=0)
    mesh.destroy()
    if not features:
        own, everywhere = held(pipe), held(load(name, 0, 1))
        for index, (here, all_of_it) in enumerate(zip(own, everywhere, strict=True)):
            is_here = kind != "cpu" and rank == (index % size if kind == "spread" else 0)
            assert here == all_of_it if is_here else here < 0.2 * all_of_it, (kind, index)


@pytest.mark.parametrize(
    ("name", "kind", "features"),
    [
        ("sd3", "spread", []),
        pytest.param("sdxl", "one", [], marks=pytest.mark.slow),
        pytest.param("sdxl", "cpu", [], marks=pytest.mark.slow),
        pytest.param("sdxl", "cpu", ["lora", "quantization"], marks=pytest.mark.slow),
        pytest.param("sdxl", "spread", ["compel", "lora"], marks=pytest.mark.slow),
        *(
            pytest.param(name, "one", [], marks=pytest.mark.slow)
            for name in ("qwenimage", "wan_t2v", "hy", "pixa")
        ),
    ],
)
def test_placed_encoders_give_the_same_images(
    run_on_ranks: Callable[..., None], name: str, kind: str, features: list[str]
) -> None:
    prepare(TABLE[name], features)
    run_on_ranks(check_placement, 2, name, kind, features)


def test_one_rank_runs_its_encoders_in_main_memory_and_skips_layers() -> None:
    asked = request_for(TABLE["sd1"], clip_skip=1)
    want = result(load("sd1", 0, 1), asked)
    placed = load("sd1", 0, 1, encoder_placement="cpu")
    torch.testing.assert_close(result(placed, asked), want, rtol=0, atol=0)
    assert held(placed)[0] < 1000 < held(load("sd1", 0, 1))[0]


def test_encoders_in_main_memory_have_their_weights_after_the_others_were_moved() -> None:
    asked = request_for(TABLE["sd1"])
    pipe = load("sd1", 0, 1, encoder_placement="cpu")
    want = result(pipe, asked)
    parts = pipe.pipe.components
    modules = [part for part in parts.values() if isinstance(part, nn.Module)]

    def to(device: torch.device) -> None:
        for module in modules:
            module._apply(torch.clone)  # parameters stay, and buffers are new

    move(SimpleNamespace(components=parts, to=to), CPU)
    pipe.forget_prompts()
    # memory is aligned otherwise, and sums have another order
    torch.testing.assert_close(result(pipe, asked), want, rtol=0, atol=1e-3)


def test_a_repeated_prompt_is_encoded_once_and_another_lora_encodes_it_again() -> None:
    case = combined(["lora"], TABLE["sd1"])
    pipe = load("sd1", 0, 1)
    calls = []
    handle = pipe.pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    first = result(pipe, request_for(TABLE["sd1"]))
    encoded = len(calls)
    again = result(pipe, request_for(TABLE["sd1"], seed=2))
    assert encoded and len(calls) == encoded and not torch.equal(first, again)
    result(pipe, request_for(TABLE["sd1"], lora=case.load["lora"]))
    assert len(calls) == 2 * encoded
    torch.testing.assert_close(result(pipe, request_for(TABLE["sd1"])), first, rtol=0, atol=0)
    pipe.forget_prompts()
    result(pipe, request_for(TABLE["sd1"]))
    assert len(calls) == 3 * encoded
    handle.remove()
