"""The errors a user can cause or must read. Knows nothing of HTTP: hosts/http/errors.py maps types
to status codes.

Every message says what was given, what is allowed, and what to do.
"""


class HostError(Exception):
    """Base of all errors whose message is meant for the person who sent the request or started the
    host.
    """


class ConfigError(HostError):
    """A launch argument, a configuration file or the model table is wrong. Exit code 2 on the
    command line.
    """


class RequestError(HostError):
    """A request says something that cannot be meant. `field` names the field at fault, where one
    is.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnsupportedError(HostError):
    """A combination of model type, backend and feature that the model table rules out; the reason
    is the table's.
    """


class PlanError(HostError):
    """Degrees, ranks, sizes or shapes do not fit together."""


class NotFoundError(HostError):
    """What was asked for by name is not here (any more)."""


class BusyError(HostError):
    """The queue is full, or the client sent too much; try again after `retry_after_s`, where that
    is known.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(HostError):
    """The host cannot take jobs: loading failed, or it is stopping."""


class CancelledError(HostError):
    """The job was cancelled on purpose. Raised on every rank at the same step."""


class RankError(HostError):
    """A rank failed while it worked on a job. `rank` is the first that did, `trace` its traceback
    (for the log).
    """

    def __init__(self, message: str, *, rank: int, trace: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return _rank_error, (self.args[0], self.rank, self.trace)


def _rank_error(message: str, rank: int, trace: str) -> RankError:
    return RankError(message, rank=rank, trace=trace)
