"""What hosts promise without a word on speed or closeness: the same request and seed give the same
image on one rank and on two, alone, among others, and across a rank that dies.
"""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from backends.model_table import read_table
from hosts.launch.auto_backend import remember
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from tests.hosts.harness import start_launcher, wait_until
from tests.hosts.sending import BODY, begun, difference, over, pixels, send

NUM_WHOLE, NUM_SHORT = 20, 5
QUICKEST = {
    "single": 1.0,
    "distrifuser cfg 2": 0.6,
    "asyncdiff segment 2 stride 1": 0.3,
    "distrifuser cfg 2 + deep,2": 0.2,
}
"""What an earlier launch has measured: the methods that are quickest by far are approximate."""
STEPS = (4, 16, 20, 3, 18)
SCHEDULERS = ("euler", "ddim", None, "euler_a")


def picture():
    colours = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(colours).save(buffer := io.BytesIO(), format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def mixed(number):
    """The body of one of many different requests."""
    body = {**BODY, "seed": number, "num_inference_steps": STEPS[number % len(STEPS)]}
    body["guidance_scale"] = 1.0 if number % 7 == 3 else 5.0
    if (scheduler := SCHEDULERS[number % len(SCHEDULERS)]) is not None:
        body["scheduler"] = scheduler
    if number % 5 == 2:
        body |= {"height": 96, "width": 64}
    if number % 6 == 4:
        body |= {"init_image": picture(), "strength": 0.7}
    return body


def finished(host, *jobs):
    done = over(host, *jobs)
    assert [job["state"] for job in done] == ["done"] * len(jobs), (done, host.log)
    return [pixels(host, job) for job in jobs]


def in_a_burst(host, bodies):
    return finished(host, *[send(host, body, client=str(body["seed"] % 3)) for body in bodies])


def across_a_dead_rank(host, bodies):
    """The last rank is killed while the first of the jobs runs."""
    old = host.ranks()
    first = begun(host, {**bodies[0], "num_inference_steps": 40})
    jobs = [send(host, body) for body in bodies]
    old[max(old)].kill()
    wait_until(
        lambda: not any(process.is_running() for process in old.values()),
        within_s=20,
        what="the old ranks are gone",
    )
    host.wait_until_ready()
    return finished(host, first, *jobs)[1:]


@pytest.fixture
def arguments(tmp_path):
    """Of a host of two ranks with defaults, which has measured its methods before."""
    settings = Settings.from_values({"type": "sdxl"})
    start = plan_start(settings, read_table(), num_gpus=0, num_ranks=2)
    remember(tmp_path, start.auto.key, replace(start.auto.measured, steps=QUICKEST))
    return ("--type=sdxl", "--nproc_per_node=2", f"--state_dir={tmp_path}")


def check(arguments, number, *, in_ways):
    """Compare all images of one and of two ranks, made in every way, with those of one rank and one
    job at a time.
    """
    bodies = [mixed(index) for index in range(number)]
    with start_launcher("--type=sdxl") as one:
        one.wait_until_ready()
        expected = [finished(one, send(one, body))[0] for body in bodies]
        found = {"one rank, burst": in_a_burst(one, bodies)}
    with start_launcher(*arguments) as two:
        two.wait_until_ready()
        assert "backends.autotune.trials" not in two.log
        for way in in_ways:
            found[f"two ranks, {way.__name__}"] = way(two, bodies)
    assert len({image.tobytes() for image in expected}) == number
    wrong = {
        (way, index): difference(image, one)
        for way, images in found.items()
        for index, (image, one) in enumerate(zip(images, expected, strict=True))
        if difference(image, one) > 1
    }
    assert not wrong


def one_by_one(host, bodies):
    return [finished(host, send(host, body))[0] for body in bodies]


def test_defaults_make_the_same_images_on_one_rank_and_on_two(arguments):
    check(arguments, NUM_SHORT, in_ways=(one_by_one, in_a_burst))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_defaults_make_the_same_images_whatever_the_load_and_across_a_dead_rank(arguments):
    check(arguments, NUM_WHOLE, in_ways=(one_by_one, in_a_burst, across_a_dead_rank))
