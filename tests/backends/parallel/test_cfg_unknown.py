"""The CFG split of a denoiser of which nothing is known: what may be divided, and no more."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch

from backends.groups.mesh import Mesh
from backends.parallel.cfg_two_calls import GuidanceChanged, _Watch
from backends.parallel.cfg_unknown import GuidanceSplit
from backends.plan import ParallelPlan
from tests.checkpoints.assembled import CONFIGS
from tests.checkpoints.parts import WIDTH


class Mixing(diffusers.PriorTransformer):
    """Rows of a batch depend on each other, as with attention over several images."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.predicted_image_embedding += output.predicted_image_embedding.mean(0)
        return output


class Picky(diffusers.PriorTransformer):
    """Takes any row beside another, and alone only the first."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(hidden_states) == 1 and not torch.equal(hidden_states, FIRST_ROW):
            raise ValueError("this row is not alone")
        return super().forward(hidden_states, *args, **kwargs)


def denoiser_of(made: type) -> torch.nn.Module:
    torch.manual_seed(0)
    model = made(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=5,
    )
    return model.eval().requires_grad_(False)


def arguments(batch: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 16, generator=generator),
        "timestep": torch.tensor(5.0),
        "proj_embedding": torch.randn(batch, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
    }


FIRST_ROW = arguments(2, 0)["hidden_states"][:1]


@contextmanager
def split_on(
    rank: int, made: type = diffusers.PriorTransformer
) -> Iterator[tuple[GuidanceSplit, Callable[..., torch.Tensor], list[int]]]:
    """Yield the split, the denoiser's call, and the rows that this rank's blocks have seen."""
    denoiser, plan = denoiser_of(made), ParallelPlan(method="single", axes=(("cfg", 2),))
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    split, rows = GuidanceSplit(denoiser, mesh), []
    denoiser.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len((*args, *kwargs.values())[0])),
        with_kwargs=True,
    )
    split.attach()
    split.begin()
    yield split, lambda *given: denoiser(**arguments(*given)).predicted_image_embedding, rows
    split.end()
    split.detach()
    mesh.destroy()


def wanted(batch: int, seed: int, made: type = diffusers.PriorTransformer) -> torch.Tensor:
    return denoiser_of(made)(**arguments(batch, seed)).predicted_image_embedding


def check_batch(rank: int, world_size: int) -> None:
    with split_on(rank) as (split, call, rows):
        for seed in range(2):
            torch.testing.assert_close(call(2, seed), wanted(2, seed), rtol=0, atol=1e-5)
            split.step_done()
        assert rows == [2, 1, 1], "whole and in halves once, then in halves"
        assert split.kind == "batch"
    with split_on(rank, Mixing) as (split, call, rows):
        for seed in range(2):
            torch.testing.assert_close(call(2, seed), wanted(2, seed, Mixing), rtol=0, atol=0)
            split.step_done()
        assert rows == [2, 1, 2]
        assert split.kind == "whole"


def check_picky(rank: int, world_size: int) -> None:
    with split_on(rank, Picky) as (split, call, _):
        for _ in range(2):
            torch.testing.assert_close(call(2, 0), wanted(2, 0, Picky), rtol=0, atol=0)
            split.step_done()
        assert split.kind == "whole"


def check_calls(rank: int, world_size: int) -> None:
    with split_on(rank) as (split, call, rows):
        for seed in range(3):
            first, second = call(1, seed), call(1, seed + 9)
            torch.testing.assert_close(first, wanted(1, seed), rtol=0, atol=0)
            torch.testing.assert_close(second, wanted(1, seed + 9), rtol=0, atol=0)
            split.step_done()
        assert rows == [1, 1, 1, 1], "both in the first step, then one of two"
        assert split.kind == "calls"
        call(1, 0)
        with pytest.raises(GuidanceChanged):
            split.step_done()
        split.begin()
        for _ in range(2):
            call(1, 0), call(1, 1)
            split.step_done()
        call(1, 0).mul_(2)
        call(1, 1)
        with pytest.raises(GuidanceChanged):
            split.step_done()
        split.refuse()
        split.begin()
        rows.clear()
        for _ in range(2):
            call(1, 0), call(1, 1)
            split.step_done()
        assert rows == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "use",
    [
        lambda first: first * 2,
        lambda first: first.mul_(2),
        lambda first: first[0].sum().item(),
        lambda first: first.chunk(1)[0] + 1,
        lambda first: torch.zeros(1, 16).copy_(first),
    ],
)
def test_a_result_that_is_used_at_once_is_computed_on_every_rank(use) -> None:
    plan = ParallelPlan(method="single", axes=())
    denoiser = denoiser_of(diffusers.PriorTransformer)
    split = GuidanceSplit(denoiser, Mesh(plan, rank=0, device=torch.device("cpu")))
    split._pairs.begin(is_on=True)
    forward = type(denoiser).forward.__get__(denoiser)
    use(split._pairs.call(forward, **arguments(1, 0)).predicted_image_embedding)
    split._pairs.call(forward, **arguments(1, 1))
    split.step_done()
    assert not split._pairs.is_split


def test_two_ranks_share_a_batch_whose_rows_are_independent(run_on_ranks: Callable) -> None:
    run_on_ranks(check_batch, 2)


def test_a_half_that_one_rank_cannot_compute_is_no_half_for_the_other(
    run_on_ranks: Callable,
) -> None:
    run_on_ranks(check_picky, 2)


def check_watched(rank: int, size: int) -> None:
    with split_on(rank) as (split, call, rows):
        seen: list[int] = []
        watch = split._denoiser.transformer_blocks[1].register_forward_hook(
            lambda module, inputs, output: seen.append(len(output))
        )
        for seed in range(3):
            call(2, seed)
        assert seen == rows == [2] * 3 and split.kind == "whole"
        watch.remove()
        split.begin()
        for seed in range(3):
            call(2, seed)
        assert rows[-1] == 1 and split.kind == "batch"


def test_a_pipeline_that_watches_parts_of_the_denoiser_sees_both_halves(
    run_on_ranks: Callable,
) -> None:
    """Self-attention guidance reads attention maps of both halves."""
    run_on_ranks(check_watched, 2)


def check_layers(rank: int, world_size: int) -> None:
    """Llama's states come as (layers, batch, tokens, channels)."""
    torch.manual_seed(0)
    denoiser = diffusers.HiDreamImageTransformer2DModel(**CONFIGS["HiDreamImageTransformer2DModel"])
    denoiser.eval().requires_grad_(False)
    plan = ParallelPlan(method="single", axes=(("cfg", 2),))
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    split, rows = GuidanceSplit(denoiser, mesh), []
    denoiser.x_embedder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for layers in (3, 2):  # two are also as many as there are rows
        given = {
            "hidden_states": torch.randn(2, 16, 32, 32),
            "timesteps": torch.full((2,), 500.0),
            "encoder_hidden_states_t5": torch.randn(2, 5, WIDTH),
            "encoder_hidden_states_llama3": torch.randn(layers, 2, 5, WIDTH),
            "pooled_embeds": torch.randn(2, 2 * WIDTH),
            "return_dict": False,
        }
        want = denoiser(**given)[0]
        split.attach()
        split.begin()
        for _ in range(2):
            torch.testing.assert_close(denoiser(**given)[0], want, rtol=0, atol=1e-5)
            split.step_done()
        assert split.kind == "batch" and rows[-1] == 1
        split.end()
        split.detach()
    mesh.destroy()


def test_halves_of_the_states_of_several_layers_are_in_their_second_dim(
    run_on_ranks: Callable,
) -> None:
    run_on_ranks(check_layers, 2)


def test_two_ranks_share_two_calls_until_the_pipeline_changes(run_on_ranks: Callable) -> None:
    run_on_ranks(check_calls, 2)


def test_a_watched_result_keeps_its_memory() -> None:
    """Else a GPU's allocator gives it to the next tensor, which would count as a use of the result,
    on one rank and perhaps not on the other.
    """
    result = torch.ones(1)
    is_there = weakref.ref(result)
    with _Watch([result]):
        del result
        assert is_there() is not None
    assert is_there() is None
