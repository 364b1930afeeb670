"""Jobs, results and a clock for tests of the queue and its store."""

import numpy as np

from backends.request import GenerateRequest, GenerateResult


class StoppedClock:
    """A clock for JobQueue that moves only when a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


def request(seed=1, **fields):
    return GenerateRequest(prompt="a cat", seed=seed, **fields)


def result(seed=1, side=8):
    frames = np.random.default_rng(seed).integers(0, 255, (1, side, side, 3), dtype=np.uint8)
    latents = np.full((1, 4, 1, 1), seed, dtype=np.float32)
    return GenerateResult(
        frames=frames,
        latents=latents,
        seed=seed,
        num_steps=2,
        exactness="exact",
        seconds=0.1,
        report={"wait_s": 0.5},
        resolved={"seed": seed},
    )


def send(queue, seed=1, **arguments):
    return queue.submit(request(seed), is_stored=True, **arguments)
