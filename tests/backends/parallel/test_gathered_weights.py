"""Divided weights: each rank keeps its share, and the image is that of whole weights."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from backends import backend_class, planner
from backends.errors import CancelledError
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.mesh import Axis, CommStats, Mesh
from backends.loading.packed_weights import pack_layer
from backends.parallel.gathered_weights import GatheredWeights, blocks_of
from backends.parallel.weight_shards import is_placeholder, weight_bytes
from backends.request import LoadRequest
from tests.backends.features import CPU, TABLE, Feature, combined, prepare, request_for, result
from tests.checkpoints import checkpoint

BOTH = ("denoiser", "encoders")


def load(name: str, rank: int, size: int, **fields: Any) -> LoadedPipeline:
    request = LoadRequest(
        model_type=name,
        checkpoint=str(checkpoint(name)),
        variant="fp32",
        parallel_vae=False,
        **fields,
    )
    return load_pipeline(TABLE[name], request, device=CPU, share=(rank, size))


def meshes(
    name: str, ways: Mapping[str, Mapping[str, object]], rank: int, size: int
) -> Iterator[Mesh]:
    for backend, options in ways.items():
        given = {**options, "checkpoint": str(checkpoint(name))}
        yield Mesh(planner(backend.split()[0])(TABLE[name], given, size), rank=rank, device=CPU)


def align(pipe: LoadedPipeline) -> None:
    """Put all weights on this rank at multiples of 64 bytes, as gathered ones and those on a GPU.

    Pages of a file are not, and kernels sum in another order there: up to 5e-5 in an image.
    """
    for module in pipe.pipe.components.values():
        for tensor in module.parameters() if isinstance(module, nn.Module) else ():
            if not is_placeholder(tensor):
                tensor.data = tensor.data.clone()


def check_divided(
    rank: int, size: int, name: str, ways: Mapping[str, Mapping[str, object]], features: list[str]
) -> None:
    spec = TABLE[name]
    case = combined(features, spec) if features else Feature()
    asked = request_for(spec, **case.request)
    whole = load(name, 0, 1, **case.load)
    want = [whole, load(name, rank, size, divided=BOTH, **case.load)]
    for pipe in want:
        align(pipe)
    for mesh in meshes(name, ways, rank, size):
        images = []
        for pipe in want:
            pipe.attach(backend_class(mesh.plan.method)(spec=spec, plan=mesh.plan, mesh=mesh))
            images.append(result(pipe, asked))
            pipe.detach()
        torch.testing.assert_close(images[1], images[0], rtol=0, atol=0)
        mesh.destroy()
    for part in (spec.denoiser, "text_encoder"):
        kept = [weight_bytes(getattr(pipe.pipe, part)) for pipe in want]
        divided = sum(weight_bytes(block) for block in blocks_of(getattr(whole.pipe, part)))
        assert divided > 0.2 * kept[0], f"{part}: {divided} of {kept[0]} bytes in blocks"
        share = 0.6 if features else 0.9  # adapters in the blocks stay whole
        assert kept[1] <= kept[0] - share * divided, f"{part}: {kept} of which {divided} in blocks"
    blocks = sum(
        weight_bytes(block)
        for part in whole.pipe.components.values()
        if isinstance(part, nn.Module) and part is not whole.pipe.vae
        for block in blocks_of(part)
    )
    assert want[1].shared.divided_bytes <= 1.2 * blocks / size


ULYSSES = {"xdit": {"ulysses_degree": 2}}
CFG = {"xdit cfg": {"use_cfg_parallel": True}}
RING = {"xdit ring": {"ring_degree": 2}}
PATCHES = {"distrifuser": {"no_split_batch": True, "sync_mode": "full_sync"}}


@pytest.mark.parametrize(
    ("name", "ways", "features"),
    [
        ("sd3", ULYSSES, ["lora"]),
        pytest.param("sd3", CFG, [], marks=pytest.mark.slow),
        pytest.param("sd3", RING | PATCHES, ["quantization"], marks=pytest.mark.slow),
        pytest.param("flux", ULYSSES | RING | PATCHES, ["gguf", "lora"], marks=pytest.mark.slow),
        pytest.param("sdxl", CFG | PATCHES, ["lora", "ip_adapter"], marks=pytest.mark.slow),
        pytest.param("sdxl", CFG, ["controlnet", "step_cache"], marks=pytest.mark.slow),
        *(
            pytest.param(name, ULYSSES | CFG, [], marks=pytest.mark.slow)
            for name in ("qwenimage", "wan_t2v", "hy", "pixa")
        ),
        *(pytest.param(name, ULYSSES, [], marks=pytest.mark.slow) for name in ("zimage", "flux2")),
    ],
)
def test_divided_weights_give_the_same_image(
    run_on_ranks: Callable[..., None], name: str, ways: Any, features: list[str]
) -> None:
    prepare(TABLE[name], features)
    run_on_ranks(check_divided, 2, name, ways, features)


def check_after_an_early_end(rank: int, size: int) -> None:
    pipe = load("sd3", rank, size, divided=BOTH)
    (mesh,) = meshes("sd3", ULYSSES, rank, size)
    pipe.attach(backend_class("xdit")(spec=pipe.spec, plan=mesh.plan, mesh=mesh))
    asked = request_for(pipe.spec)
    before = result(pipe, asked)

    def fail(step: int, num_steps: int, latents: torch.Tensor) -> None:
        raise ValueError("this rank is out of luck")

    def cancel(step: int, num_steps: int, latents: torch.Tensor) -> None:
        raise CancelledError("not wanted any more")

    with pytest.raises(CancelledError):
        pipe.generate(asked, on_step=cancel)
    torch.testing.assert_close(result(pipe, asked), before, rtol=0, atol=0)
    with pytest.raises((ValueError, RuntimeError)):
        pipe.generate(asked, on_step=fail if rank else None)
    mesh.rebuild()
    torch.testing.assert_close(result(pipe, asked), before, rtol=0, atol=0)
    pipe.rest()
    torch.testing.assert_close(result(pipe, asked), before, rtol=0, atol=0)
    mesh.destroy()


def test_after_a_cancelled_and_a_failed_run_the_image_is_the_same(
    run_on_ranks: Callable[..., None],
) -> None:
    prepare(TABLE["sd3"], [])
    run_on_ranks(check_after_an_early_end, 2)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_packed_weights_are_divided_as_plain_ones_are(kind: str) -> None:
    parts = [(part, load("sd3", 0, 1).pipe) for part in ("transformer", "text_encoder_3")]
    for part, pipe in parts:
        model = getattr(pipe, part)
        plain = list(map(type, blocks_of(model)))
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                pack_layer(layer, kind)
        blocks = blocks_of(model)
        assert list(map(type, blocks)) == plain
        before = sum(map(weight_bytes, blocks))
        shares = GatheredWeights(rank=0, size=2)
        for block in blocks:
            shares.take(block, device=CPU)
        assert 0.5 * before <= shares.num_bytes < 0.6 * before
        assert sum(map(weight_bytes, blocks)) < 0.1 * before


def test_every_weight_of_a_level_is_in_the_blocks_of_a_unet() -> None:
    unet = load("sdxl", 0, 1).pipe.unet
    blocks = blocks_of(unet)
    names = {type(block).__name__ for block in blocks}
    assert {"ResnetBlock2D", "BasicTransformerBlock"} <= names
    assert sum(map(weight_bytes, blocks)) > 0.8 * weight_bytes(unet)
    assert max(map(weight_bytes, blocks)) < 0.2 * weight_bytes(unet)


def test_weights_of_any_dtype_are_cut_into_equal_shares_of_their_bytes() -> None:
    layer = nn.Linear(33, 7)
    layer.register_buffer("counts", torch.arange(5, dtype=torch.int8))
    shares = []
    for rank in range(3):
        gathered = GatheredWeights(rank=rank, size=3)
        copy = nn.Linear(33, 7)
        copy.register_buffer("counts", layer.counts.clone())
        copy.load_state_dict(layer.state_dict())
        gathered.take(copy, device=CPU)
        assert weight_bytes(copy) == 4 + 4 + 1
        shares.append(gathered._blocks[0])
    assert len({block.share.numel() for block in shares}) == 1
    content = torch.cat([block.share for block in shares])
    for piece, wanted in zip(
        shares[0].pieces, (layer.weight, layer.bias, layer.counts), strict=True
    ):
        found = content[piece.first : piece.first + piece.num_bytes].view(wanted.dtype)
        assert torch.equal(found.view(wanted.shape), wanted.detach())


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.rand(3) + 1)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.weight * self.scale


def test_block_that_was_moved_gets_its_weights_in_its_new_buffers() -> None:
    block, value = Scaled(), torch.randn(3)
    want = block(value)
    gathered = GatheredWeights(rank=0, size=1)
    gathered.take(block, device=CPU)
    gathered.use(Axis(name="all", ranks=(0,), rank=0, group=None), CommStats())
    block._apply(torch.clone)  # as .to() another device: parameters stay, and buffers are new
    gathered.move(CPU)
    assert torch.equal(block(value), want)


def test_block_that_was_gathered_for_nothing_is_let_go() -> None:
    """A text encoder that was called twice is expected a third time, but the denoiser comes."""
    encoder, denoiser = ([Scaled(), Scaled()] for _ in range(2))
    gathered = GatheredWeights(rank=0, size=1)
    for block in (*encoder, *denoiser):
        gathered.take(block, device=CPU)
    gathered.use(Axis(name="all", ranks=(0,), rank=0, group=None), CommStats())
    gathered.begin()
    for block in (*encoder, *encoder, *denoiser):
        block(torch.randn(3))
    assert not gathered._pending
