"""Adapters, quantised weights and compiled units act in the stale steps too: the schedule with them
equals its simulation with them.
"""

import pytest
import torch
import torch._dynamo

from backends.model_table import read_table
from tests.backends import features
from tests.backends.asyncdiff.runs import attached, request, result
from tests.backends.asyncdiff.test_stale import compare_with_simulation

TABLE = read_table()


def check_features(rank, world_size, name, groups):
    spec = TABLE[name]
    for group in groups:
        cases = [features.feature(what, spec) for what in group]
        load = {key: value for case in cases for key, value in case.load.items()}
        fields = {key: value for case in cases for key, value in case.request.items()}
        pipe = features.loaded(spec, **load)
        asked = request(name, num_inference_steps=5, warmup_steps=2, **fields)
        with attached(pipe, {}, rank=rank, world_size=world_size) as backend:
            got = result(pipe, asked)
            graphs = features.num_graphs()
            torch.testing.assert_close(result(pipe, asked), got, rtol=0, atol=0)
            assert features.num_graphs() == graphs, "the second image was compiled again"
            assert (graphs > 0) == ("compile" in group)
            segments = backend.segments
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compare_with_simulation(pipe, asked, backend.plan, segments, got, f"{name} {group}: ")
        torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("sdxl", [("lora", "controlnet", "ip_adapter")]),
        ("sdxl", [("quantization", "compile")]),
        ("sd1", [("controlnet",), ("ip_adapter", "lora")]),
        ("flux", [("gguf", "lora"), ("controlnet",), ("compile",)]),
        ("ad", [("lora", "controlnet")]),
    ],
    ids=["sdxl", "sdxl, quantised and compiled", "sd1", "flux", "ad"],
)
def test_stale_schedule_with_features_equals_its_simulation(run_on_ranks, name, groups):
    features.prepare(TABLE[name], [what for group in groups for what in group])
    run_on_ranks(check_features, 2, name, groups)
