"""The position within a generation: whether the step is synchronous, which patch this rank has, how
often each network has been called.
"""

from collections import Counter

from backends.distrifuser.modes import SyncMode
from backends.step_cache_spec import StepCacheSpec


class StepClock:
    """The step clock of one generation, the same on every rank. A step is one evaluation of the
    denoiser by the sampler.
    """

    def __init__(self) -> None:
        self.start(synchronous_steps=0)

    def start(
        self,
        *,
        synchronous_steps: int,
        extrapolates: bool = False,
        step_cache: StepCacheSpec | None = None,
    ) -> None:
        """Start a generation. extrapolates: stale values are continued along the line through the
        last two steps. step_cache: a regular one.
        """
        self.synchronous_steps = synchronous_steps
        self.extrapolates = extrapolates
        self._step_cache = step_cache
        self.step = 0
        self._calls: Counter[str] = Counter()

    def step_done(self) -> None:
        """Count one step."""
        self.step += 1
        self._calls.clear()

    def next_call(self, network: str) -> tuple[str, int]:
        """Return the network's name and the number of the call that begins now, as a key for its
        buffers.
        """
        self._calls[network] += 1
        return network, self._calls[network] - 1

    @property
    def is_synchronous(self) -> bool:
        """Return whether the present step exchanges everything at once."""
        return self.step < self.synchronous_steps

    @property
    def is_skipped(self) -> bool:
        """Return whether the denoiser runs only its outermost parts in the present step."""
        return self._step_cache is not None and self._step_cache.skips(self.step)

    def dim(self, split_scheme: str) -> int:
        """Return the dim of an image that is cut in this step: rows (-2) or columns (-1)."""
        if split_scheme == "alternate":
            return -2 if self.step % 2 == 0 else -1
        return -1 if split_scheme == "col" else -2

    def turn(self, mode: SyncMode) -> int:
        """Return by how many patches the ranks have moved on (mode `rotate`)."""
        return self.step if mode.takes_turns and not self.is_synchronous else 0
