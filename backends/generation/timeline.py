"""When one rank did what for one image: encode, each step, decode. For /metrics and traces; costs
one look at the clock a step.
"""

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class StageClock:
    """Stages follow one another without gaps. spans: (stage, when it began in seconds since 1970,
    how long it took in seconds).
    """

    spans: list[tuple[str, float, float]] = field(default_factory=list)
    _stage: str = "encode"
    _since: float = field(default_factory=time.perf_counter)
    _zero: float = field(default_factory=lambda: time.time() - time.perf_counter())

    def next(self, stage: str) -> None:
        """The stage so far is over; `stage` begins."""
        now = time.perf_counter()
        self.spans.append((self._stage, self._zero + self._since, now - self._since))
        self._stage, self._since = stage, now

    def end(self) -> None:
        """The last stage is over. Steps that were begun but never done (the look beyond the last
        one) are part of the decoding.
        """
        self.next("")

    def seconds(self) -> dict[str, float]:
        """Of each stage in all, in the order in which they began."""
        sums: dict[str, float] = {}
        for stage, _, seconds in self.spans:
            sums[stage] = sums.get(stage, 0.0) + seconds
        return sums
