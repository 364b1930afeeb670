"""The operator's limits: how much one request may ask for, and how many requests a client may
send.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from backends.errors import BusyError, RequestError
from backends.request import GenerateRequest
from hosts.jobs.queue import JobQueue
from hosts.jobs.store import Store
from hosts.launch.settings import Settings
from hosts.supervision.exit_reports import ExitReport

MAX_IMAGES = 16
"""Images in one field: each may be small to send and large in memory."""
MAX_CLIENTS = 10_000
"""Clients whose rates are remembered. The longest inactive one is forgotten first."""
TEXTS = ("prompt", "negative_prompt")
BOUNDS = {
    "num_inference_steps": "max_steps",
    "first_step": "max_steps",
    "stop_step": "max_steps",
    "warmup_steps": "max_steps",
    "height": "max_side",
    "width": "max_side",
    "num_frames": "max_frames",
    **dict.fromkeys(TEXTS, "max_prompt_chars"),
}
"""Request field -> the launch argument that limits it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Each field is the launch argument of the same name."""

    max_steps: int
    max_side: int
    max_frames: int
    max_prompt_chars: int
    max_image_megapixels: int

    @classmethod
    def by(cls, settings: Settings) -> "Limits":
        return cls(**{name: getattr(settings, name) for name in cls.__slots__})

    def check(self, request: GenerateRequest, names: Mapping[str, str]) -> None:
        """Raise RequestError for the first value that is too large.

        Defaults are not checked: they are the operator's choice. names: field -> name that the
        client used.
        """
        steps = max(
            request.num_inference_steps or 0,
            len(request.sigmas or ()) - 1,
            len(request.timesteps or ()),
        )
        found = {field: getattr(request, field) or 0 for field in BOUNDS if field not in TEXTS}
        for field, given in {**found, "num_inference_steps": steps}.items():
            self._require(given, BOUNDS[field], names.get(field, field))
        for field in TEXTS:
            name = names.get(field, field)
            if (given := len(getattr(request, field) or "")) > self.max_prompt_chars:
                raise RequestError(
                    f"{name} has {given} characters, more than this host allows: "
                    f"{self.max_prompt_chars} (--max_prompt_chars). Send less.",
                    field=name,
                )

    def _require(self, given: int, limit: str, field: str) -> None:
        allowed = getattr(self, limit)
        if given > allowed:
            raise RequestError(
                f"{field}={given} is more than this host allows: {allowed} (--{limit}). Ask for "
                "less.",
                field=field,
            )


DEFAULT_LIMITS = Limits.by(Settings())


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """Upper limits for one field. Every limit is a positive integer.

    The defaults admit what clients send at the largest sizes that models generate (a 4096 x 4096
    image or its latents, embeds of 512 tokens), with room to spare, and no more than a request body
    may hold.
    """

    max_encoded_bytes: int = 256 * 2**20
    """Characters of base64, or bytes of an image file."""
    max_pixels: int = 24 * 2**20
    """Width times height of one image. Decoding briefly takes up to 20 bytes per pixel."""
    max_tensor_elements: int = 32 * 2**20
    """Elements of one tensor after its strides are applied."""
    max_depth: int = 32
    """Nesting depth of containers."""
    max_opcodes: int = 100_000
    """Pickle instructions: an image takes about 25, or 800 with a palette."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"DecodeLimits.{field.name}={value!r} is not allowed. Give a positive integer."
                )


class RateLimit:
    """Limits the requests per minute of each client.

    A token bucket: it holds one minute's requests and refills evenly.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """per_minute: 0 for no limit."""
        self._per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = (
            OrderedDict()
        )  # client -> (requests left, time)

    def take(self, client: str) -> None:
        """Count one request of this client. BusyError with the seconds to wait if none is left."""
        if self._per_minute == 0:
            return
        with self._lock:
            now = self._clock()
            left, since = self._buckets.pop(client, (float(self._per_minute), now))
            left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
            self._buckets[client] = (left - 1 if left >= 1 else left, now)
            if len(self._buckets) > MAX_CLIENTS:
                self._buckets.popitem(last=False)
        if left < 1:
            wait_s = (1 - left) * 60 / self._per_minute
            raise BusyError(
                f"more than {self._per_minute} requests in a minute from one client "
                f"(--rate_limit). Try again in {wait_s:.0f} s.",
                retry_after_s=wait_s,
            )


def queue_within(
    settings: Settings,
    store: Store | None,
    *,
    complete: Callable[[ExitReport], ExitReport] = lambda ending: ending,
) -> JobQueue:
    """Return a queue with the operator's limits. complete: see JobQueue."""
    return JobQueue(
        capacity=settings.queue_size,
        max_seconds=settings.max_job_seconds,
        num_kept=settings.keep_results,
        kept_bytes=settings.keep_results_mb * 10**6,
        kept_seconds=settings.keep_results_hours * 3600,
        store=store,
        complete=complete,
    )
