"""Hosts of two ranks that divide weights or place text encoders: the images of one rank."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import checkpoint
from tests.hosts.harness import RunningHost, start_launcher

ARGUMENTS = ("--type=sd3", "--variant=fp32", "--height=64", "--width=64")
TWO_RANKS = ("--nproc_per_node=2", "--backend=xdit", "--use_cfg_parallel")


def image(host: RunningHost, prompt: str) -> np.ndarray:
    body = {"prompt": prompt, "seed": 1, "num_inference_steps": 2}
    answer = host.post(body, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    return np.array(Image.open(io.BytesIO(answer.content))).astype(int)


@pytest.fixture(scope="module")
def wanted() -> list[np.ndarray]:
    with start_launcher(f"--checkpoint={checkpoint('sd3')}", *ARGUMENTS) as host:
        host.wait_until_ready()
        return [image(host, prompt) for prompt in ("a cat", "a dog")]


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (
            ("--shard=always", "--encoder_placement=spread"),
            {"divided": ["denoiser"], "encoder_placement": "spread"},
        ),
        pytest.param(
            ("--shard=always",),
            {"divided": ["denoiser", "encoders"], "encoder_placement": "every"},
            marks=pytest.mark.slow,
        ),
        *(
            pytest.param(
                (f"--encoder_placement={kind}",),
                {"encoder_placement": kind},
                marks=pytest.mark.slow,
            )
            for kind in ("every", "one", "cpu")
        ),
    ],
)
def test_the_images_are_those_of_one_rank(wanted, arguments, facts):
    with start_launcher(
        f"--checkpoint={checkpoint('sd3')}", *ARGUMENTS, *TWO_RANKS, *arguments
    ) as host:
        host.wait_until_ready()
        found = [image(host, prompt) for prompt in ("a cat", "a dog")]
        settings = host.get("/settings").json()
        assert {name: settings.get(name) for name in facts} == facts
    for mine, one in zip(found, wanted, strict=True):
        assert np.abs(mine - one).max() <= 1
