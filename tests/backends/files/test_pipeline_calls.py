"""What pipeline classes of diffusers give to their schedulers, read from their source."""

import pytest

from backends.files.pipeline_calls import called_on_sampler, given_to_sampler


@pytest.mark.parametrize(
    ("pipeline", "sampler", "given"),
    [
        ("BriaPipeline", "FlowMatchHeunDiscreteScheduler", {"sigmas"}),
        # here mu depends on a setting of the checkpoint's
        ("BriaPipeline", "FlowMatchEulerDiscreteScheduler", {"sigmas"}),
        ("BriaPipeline", "DDIMScheduler", set()),
        ("BriaPipeline", "EulerAncestralDiscreteScheduler", set()),
        ("FluxFillPipeline", "FlowMatchHeunDiscreteScheduler", {"mu", "sigmas"}),
        # in a dict, and not to every sampler
        ("HiDreamImagePipeline", "FlowMatchHeunDiscreteScheduler", {"mu"}),
        ("HiDreamImagePipeline", "UniPCMultistepScheduler", set()),
    ],
)
def test_what_is_given_depends_on_the_class_of_the_sampler(pipeline, sampler, given):
    assert given_to_sampler(pipeline, sampler=sampler, flow_sigmas=False) == given


def test_a_method_that_another_sampler_is_spared_is_called_on_this_one():
    for sampler, is_called in (("FlowMatchLCM", True), ("FlowMatchEulerDiscrete", False)):
        called = called_on_sampler("BriaPipeline", sampler=f"{sampler}Scheduler")
        assert ("scale_model_input" in called) is is_called
        assert "step" in called
