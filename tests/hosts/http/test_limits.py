"""Bounds of one request, and the rate of one client: a bucket that fills up evenly."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from backends.errors import BusyError, RequestError
from backends.request import GenerateRequest
from hosts.http import limits
from hosts.http.limits import DEFAULT_LIMITS, RateLimit


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_bucket_fills_up_evenly_and_no_further_than_a_minutes_worth():
    clock = Clock()
    rate = RateLimit(6, clock=clock)
    for _ in range(6):
        rate.take("a")
    with pytest.raises(BusyError, match=r"more than 6 requests in a minute.*Try again in 10 s"):
        rate.take("a")
    clock.now = 10.1
    rate.take("a")
    with pytest.raises(BusyError) as refused:
        rate.take("a")
    assert 9 < refused.value.retry_after_s < 10
    clock.now = 10_000.0
    for _ in range(6):
        rate.take("a")
    with pytest.raises(BusyError):
        rate.take("a")


def test_clients_do_not_share_a_bucket():
    rate = RateLimit(1, clock=Clock())
    rate.take("a")
    rate.take("b")
    with pytest.raises(BusyError):
        rate.take("a")


def test_refused_request_costs_nothing():
    clock = Clock()
    rate = RateLimit(1, clock=clock)
    rate.take("a")
    for _ in range(50):
        clock.now += 1
        with pytest.raises(BusyError):
            rate.take("a")
    clock.now = 60.1
    rate.take("a")


def test_zero_is_any_number():
    rate = RateLimit(0, clock=Clock())
    for _ in range(1000):
        rate.take("a")


def test_memory_of_clients_is_bounded(monkeypatch):
    monkeypatch.setattr(limits, "MAX_CLIENTS", 3)
    rate = RateLimit(1, clock=Clock())
    for client in "abcd":
        rate.take(client)
    rate.take("a")  # forgotten
    with pytest.raises(BusyError):
        rate.take("d")


@pytest.mark.parametrize(
    ("fields", "upscale", "field"),
    [
        ({"latents": np.zeros((1, 4, 8, 128), np.float32)}, 1, "latents"),
        ({"init_image": Image.new("RGB", (8, 2000))}, 1, "init_image"),
        ({"init_image": Image.new("RGB", (2000, 8))}, 1, "init_image"),
        ({"image": Image.new("RGB", (72, 64))}, 4, "image"),
    ],
)
def test_side_that_the_result_takes_from_its_input_is_bounded_too(fields, upscale, field):
    small = replace(DEFAULT_LIMITS, max_side=256)
    with pytest.raises(RequestError, match=rf"{field} makes .* allows: 256 \(--max_side\)") as why:
        small.check(GenerateRequest(**fields), {}, upscale=upscale)
    assert why.value.field == field
    DEFAULT_LIMITS.check(GenerateRequest(**fields), {}, upscale=upscale)


def test_image_that_is_scaled_to_a_given_size_may_be_larger():
    small = replace(DEFAULT_LIMITS, max_side=256)
    large = Image.new("RGB", (2000, 2000))
    small.check(GenerateRequest(init_image=large, height=64, width=64, image=large), {})
