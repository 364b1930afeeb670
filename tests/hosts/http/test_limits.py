"""The rate of one client: a bucket that fills up evenly."""

import pytest

from backends.errors import BusyError
from hosts.http import limits
from hosts.http.limits import RateLimit


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
