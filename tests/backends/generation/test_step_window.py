"""Runs that end early and go on later, latents as the denoiser has them, and weights that rest:
what clients of the v2 protocol ask for.
"""

import numpy as np
import pytest

from backends.errors import UnsupportedError
from tests.backends.features import TABLE, loaded, request_for

FIELDS = {"num_inference_steps": 4, "height": 64, "width": 64, "warmup_steps": None}


@pytest.mark.parametrize("name", ["sdxl", pytest.param("flux", marks=pytest.mark.slow)])
@pytest.mark.parametrize("space", ["vae", "model"])
def test_run_goes_on_where_another_ended(name, space):
    pipe, spec = loaded(TABLE[name]), TABLE[name]
    whole = pipe.generate(request_for(spec, **FIELDS, latent_space=space)).latents
    half = pipe.generate(request_for(spec, **FIELDS, latent_space=space, stop_step=2))
    assert half.num_steps == 2 and np.abs(half.latents - whole).max() > 0.1
    rest = pipe.generate(
        request_for(spec, **FIELDS, latent_space=space, first_step=2, latents=half.latents)
    )
    assert rest.num_steps == 2
    np.testing.assert_allclose(rest.latents, whole, rtol=0, atol=1e-4 * np.abs(whole).max())


def test_latents_of_the_model_are_scaled_and_those_of_the_vae_are_not():
    pipe, spec = loaded(TABLE["flux"]), TABLE["flux"]
    plain, scaled = (
        pipe.generate(request_for(spec, **FIELDS, latent_space=space)).latents
        for space in ("vae", "model")
    )
    config = pipe.pipe.vae.config
    np.testing.assert_allclose(
        scaled, (plain - config.shift_factor) * config.scaling_factor, rtol=1e-5, atol=1e-5
    )


def test_weights_that_rest_draw_the_same_and_those_that_are_offloaded_do_not_rest():
    pipe, spec = loaded(TABLE["sdxl"]), TABLE["sdxl"]
    before = pipe.generate(request_for(spec, **FIELDS)).latents
    pipe.rest()
    assert (pipe.generate(request_for(spec, **FIELDS)).latents == before).all()
    with pytest.raises(
        UnsupportedError, match=r"cannot be kept in main memory: offloading \(model\)"
    ):
        loaded(TABLE["sdxl"], offload="model").rest()


def test_compel_is_refused_where_it_is_not_loaded_and_can_be_left_out_where_it_is():
    pipe, spec = loaded(TABLE["sdxl"]), TABLE["sdxl"]
    with pytest.raises(UnsupportedError, match="compel is not loaded on this host"):
        pipe.check(request_for(spec, compel=True))
    asked = request_for(spec, **FIELDS, prompt="a (cat)1.7")
    reader = loaded(spec, compel=True)
    plain, read = (
        reader.generate(asked.model_copy(update={"compel": value})).latents
        for value in (False, None)
    )
    assert (pipe.generate(asked).latents == plain).all() and np.abs(read - plain).max() > 0.02
