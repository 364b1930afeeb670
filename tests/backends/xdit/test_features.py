"""Adapters, quantised weights, compiled parts and starts from an image under every method of xdit
equal one device.
"""

import pytest
import torch._dynamo

from backends.model_table import read_table
from tests.backends import features
from tests.backends.reference import from_rank_zero
from tests.backends.xdit.ranks import assert_close, attached, generated, latents_of
from tests.backends.xdit.simulation import simulate
from tests.checkpoints import load, lora

TABLE = read_table()
METHODS = {
    "cfg": {"use_cfg_parallel": True},
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "stages": {"pipefusion_parallel_degree": 2},
}
STEPS = 2


def check_features(rank, world_size, name, groups):
    """PipeFusion is asked for synchronous steps only, so that it is exact too."""
    spec = TABLE[name]
    for group in groups:
        cases = [features.feature(what, spec) for what in group if what != "start"]
        loading = {key: value for case in cases for key, value in case.load.items()}
        fields = {key: value for case in cases for key, value in case.request.items()}
        pipe = features.loaded(spec, **loading)
        if "start" in group:
            clean = from_rank_zero(lambda: features.result(pipe, features.request_for(spec)))
            fields |= {
                "latents": clean.numpy(),
                "strength": 0.7,
                "denoising_end": 0.8,
                "num_inference_steps": 5,
                "warmup_steps": 5,
            }
        asked = features.request_for(spec, **fields)
        want = from_rank_zero(lambda: features.result(pipe, asked))
        for label, options in METHODS.items():
            if (label == "cfg" and spec.guidance == "distilled") or (
                label == "stages" and name == "hy"
            ):
                continue
            with attached(pipe.pipe, name, rank, world_size, **options) as backend:
                pipe._backend = backend
                assert_close(features.result(pipe, asked), want, (name, group, label))
                pipe._backend = None
        torch._dynamo.reset()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("sd3", [("lora", "controlnet"), ("ip_adapter",), ("quantization", "start")]),
        pytest.param(
            "flux",
            [("lora", "controlnet"), ("ip_adapter",), ("gguf", "start")],
            marks=pytest.mark.slow,
        ),
        pytest.param("hy", [("controlnet",), ("quantization", "start")], marks=pytest.mark.slow),
        pytest.param("pixs", [("quantization", "start")], marks=pytest.mark.slow),
    ],
    ids=["sd3", "flux", "hy", "pixs"],
)
def test_features_under_every_method_equal_one_device(run_on_ranks, name, groups):
    features.prepare(TABLE[name], [what for group in groups for what in group if what != "start"])
    run_on_ranks(check_features, 2, name, groups)


def check_live_lora(rank, world_size, name):
    """A LoRA that is loaded while the method is attached acts in it, stale steps included, and
    leaves nothing when it is unloaded.
    """

    def reference(path):
        pipe = load(name)
        if path is not None:
            pipe.load_lora_weights(path)
        simulate(pipe.transformer, name, num_patches=3, warmup_steps=1)
        return latents_of(pipe, name, steps=4)

    path = str(lora(name))
    plain, changed = from_rank_zero(lambda: (reference(None), reference(path)))
    assert (plain - changed).abs().max() > 1e-2 * plain.abs().max()
    pipe = load(name)
    with attached(
        pipe,
        name,
        rank,
        world_size,
        pipefusion_parallel_degree=2,
        num_pipeline_patch=3,
        warmup_steps=1,
    ) as backend:
        pipe.load_lora_weights(path)
        assert_close(generated(backend, pipe, name, steps=4), changed, "loaded")
        pipe.unload_lora_weights()
        assert_close(generated(backend, pipe, name, steps=4), plain, "unloaded")


@pytest.mark.parametrize("name", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_lora_loaded_under_pipefusion_acts_and_can_be_unloaded(run_on_ranks, name):
    lora(name)
    run_on_ranks(check_live_lora, 2, name)
