"""Spans of one generation: in order, without gaps, as long as the whole."""

import time

from backends.generation.run import StageClock


def test_spans_follow_one_another_and_add_up():
    clock = StageClock()
    began = time.time()
    for stage in ("step", "step", "decode"):
        time.sleep(0.01)
        clock.next(stage)
    time.sleep(0.01)
    clock.end()
    assert [stage for stage, _, _ in clock.spans] == ["encode", "step", "step", "decode"]
    for (_, start, seconds), (_, following, _) in zip(clock.spans, clock.spans[1:], strict=False):
        assert abs(start + seconds - following) < 1e-6 and seconds >= 0.01
    assert abs(clock.spans[0][1] - began) < 0.05
    assert list(clock.seconds()) == ["encode", "step", "decode"] and clock.seconds()["step"] >= 0.02
