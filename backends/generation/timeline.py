"""When one rank encoded, ran each step and decoded. For /metrics and traces."""

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class StageClock:
    """The consecutive stages of one generation, without gaps between them."""

    # (stage, start in seconds since 1970, duration in seconds)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    _stage: str = "encode"
    _since: float = field(default_factory=time.perf_counter)
    _zero: float = field(default_factory=lambda: time.time() - time.perf_counter())

    def next(self, stage: str) -> None:
        """End the current stage and begin `stage`."""
        now = time.perf_counter()
        self.spans.append((self._stage, self._zero + self._since, now - self._since))
        self._stage, self._since = stage, now

    def end(self) -> None:
        """End the last stage. A step that began after the last one was done counts as decoding."""
        self.next("")

    def seconds(self) -> dict[str, float]:
        """Return the total duration of each stage, in order of first appearance."""
        sums: dict[str, float] = {}
        for stage, _, seconds in self.spans:
            sums[stage] = sums.get(stage, 0.0) + seconds
        return sums
