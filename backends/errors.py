"""Errors that users cause or read. hosts/http/errors.py maps the types to HTTP status codes.

Every message says what was given, what is allowed, and what to do.
"""


class HostError(Exception):
    """Base of all errors whose message is written for the client or the operator."""


class ConfigError(HostError):
    """A wrong launch argument, configuration file or model table. Exit code 2."""


class FieldError(HostError):
    """An error for a request. `field` names the field at fault, if known."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class RequestError(FieldError):
    """A request with a missing or invalid value."""


class UnsendableError(RequestError):
    """A message between ranks cannot be serialised. No part of it was sent."""


class UnsupportedError(FieldError):
    """A combination of model type, backend and feature that is not available."""


class PlanError(HostError):
    """Degrees, ranks, sizes or shapes do not fit together."""


class NotFoundError(HostError):
    """The named thing does not exist, or no longer."""


class BusyError(HostError):
    """The queue is full or the client is over its limit. Retry after `retry_after_s`, if known."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(HostError):
    """The host cannot take jobs: loading failed, or it is shutting down."""


class CancelledError(HostError):
    """The job was cancelled on purpose. Raised on every rank at the same step."""


class RankError(HostError):
    """A rank failed during a job. `rank` failed first; `trace` is its traceback, for the log."""

    def __init__(self, message: str, *, rank: int, trace: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return _rank_error, (self.args[0], self.rank, self.trace)


def _rank_error(message: str, rank: int, trace: str) -> RankError:
    return RankError(message, rank=rank, trace=trace)
