"""A small client for a host of diffusion-launcher: the standard library only.

client = Client("http://127.0.0.1:6000")
job = client.submit(prompt="a red circle on a blue background", seed=1)
for state in job.follow():
    print(state.step, state.steps)
Path("circle.png").write_bytes(job.result())

diffusion_client.local starts a host on this machine.
"""

import base64
import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

__all__ = ["PATIENCE_S", "Client", "HostError", "Job", "JobState"]

OVER = frozenset({"done", "failed", "cancelled"})
PATIENCE_S = 120.0
"""A rank that died is back within a minute, also with a large model on a slow disk."""
POLL_S = 0.5
LOOK_TIMEOUT_S = 20.0
EVENTS_TIMEOUT_S = 60.0
"""A host sends something each 10 s, so a stream that is silent for this long is dead."""
PASSING = frozenset({0, 429, 502, 503, 504})
"""Nobody answered, or a status that says to ask again later."""
BROKEN = (OSError, http.client.HTTPException)
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)

_Answer = TypeVar("_Answer")


class HostError(Exception):
    """What the host said, its HTTP status and the JSON it came in.

    status: 0 where no host answered.
    """

    def __init__(self, message: str, *, status: int, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body or {}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """One look at a job. Times in seconds; settings are there once it is done.

    notes: what was not done as asked. preview: a small JPEG of the last step, where it was asked
    for.
    """

    id: str
    state: str
    position: int
    step: int
    steps: int
    seconds: float | None
    eta: float | None
    seed: int
    exactness: str | None
    settings: dict[str, Any] | None
    error: str | None
    notes: list[str] = field(default_factory=list)
    preview: bytes | None = None

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @classmethod
    def read(cls, body: dict[str, Any]) -> "JobState":
        given = (each.name for each in fields(cls) if each.name != "preview")
        return cls(**{name: body[name] for name in given if name != "notes" or name in body})


class Client:
    """A host or gateway at an address. HostError if that cannot be one.

    api_key: sent as a bearer token. timeout_s: for each answer to begin and go on; None waits.
    uses_proxies: those of the environment. patience_s: how long a job that is followed may be out
    of reach while its host restarts; 0 raises at once. during_outage: called meanwhile; may raise.
    model: which of the host's models jobs are for; None for its first.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:6000",
        *,
        api_key: str | None = None,
        timeout_s: float | None = None,
        uses_proxies: bool = True,
        patience_s: float = PATIENCE_S,
        during_outage: Callable[[], None] = lambda: None,
        model: str | None = None,
    ) -> None:
        self.url = _checked(url)
        self.model = model
        self.patience_s = patience_s
        self._timeout_s = timeout_s
        self._during_outage = during_outage
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(None if uses_proxies else {})
        )
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def submit(self, *, idempotency_key: str | None = None, **fields: Any) -> "Job":
        """Queue a job; the fields are those of the host's /openapi.json. HostError if it is
        refused.

        idempotency_key: a name for the job; under the same name the same fields give the job that
        is there already.
        """
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key is not None else {}
        named = {"model": self.model} if self.model is not None else {}
        data = self.open("/v1/jobs", method="POST", body={**named, **fields}, headers=headers)
        return Job(self, self._parse(data, JobState.read))

    def generate(self, **fields: Any) -> bytes:
        """The finished image (PNG) or video (MP4)."""
        job = self.submit(**fields)
        job.wait()
        return job.result()

    def job(self, job_id: str) -> "Job":
        """One that was submitted before."""
        return Job(self, self.state(job_id))

    def state(self, job_id: str, *, timeout_s: float | None = None) -> JobState:
        """Look at a job once."""
        return self._parse(self.open(f"/v1/jobs/{job_id}", timeout_s=timeout_s), JobState.read)

    def health(self) -> dict[str, Any]:
        """Its phase (loading, ready, failed, stopping), the reason for it, and how many jobs
        wait.
        """
        try:
            return self._object("/healthz")
        except HostError as error:
            if error.status != 503 or "phase" not in error.body:
                raise
            return error.body

    def cluster(self) -> dict[str, Any]:
        """The models of a gateway and their replicas; of a single host its health."""
        try:
            return self._object("/cluster")
        except HostError as error:
            if error.status != 404 or not error.body:
                raise
            return self.health()

    def jobs(self) -> list[JobState]:
        """All jobs of the host, without their settings: the one that runs, those that wait, those
        that are over.
        """
        return self._parse(
            self.open("/v1/jobs"),
            lambda body: [JobState.read({"settings": None, **job}) for job in body["jobs"]],
        )

    def trace(self, job_id: str) -> dict[str, Any]:
        """What every rank did when, as a Chrome trace."""
        return self._object(f"/v1/jobs/{job_id}/trace")

    def models(self) -> list[str]:
        """The names of the models it serves."""
        return self._parse(
            self.open("/v1/models"), lambda body: [model["id"] for model in body["data"]]
        )

    def loras(self) -> list[dict[str, Any]]:
        """The LoRAs that requests may use: `name`, and the `path` under which `lora` names one."""
        return self._parse(self.open("/sdapi/v1/loras"), list)

    def settings(self) -> dict[str, Any]:
        """What it serves, on how many ranks, and why so."""
        return self._object("/settings")

    def schema(self) -> dict[str, Any]:
        """What the host takes for the model, as OpenAPI."""
        query = f"?{urlencode({'model': self.model})}" if self.model is not None else ""
        return self._object(f"/openapi.json{query}")

    def request_schema(self) -> dict[str, Any]:
        """The fields that it takes for its model, as JSON schema."""
        return self.schema()["components"]["schemas"]["Request"]

    def open(
        self,
        path: str,
        *,
        method: str = "GET",
        body: Any = None,
        accept: str = "*/*",
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """One request; the answer's body. HostError for anything but success."""
        with self.stream(
            path, method=method, body=body, accept=accept, headers=headers, timeout_s=timeout_s
        ) as answer:
            try:
                return answer.read()
            except BROKEN as error:
                raise self.lost(error) from error

    def stream(
        self,
        path: str,
        *,
        method: str = "GET",
        body: Any = None,
        accept: str = "*/*",
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """The same, open for reading as it comes. timeout_s: where the client has none."""
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if data is not None else {}
        sent = {**self._headers, "Accept": accept, **kind, **(headers or {})}
        try:
            return self._opener.open(
                urllib.request.Request(self.url + path, data, sent, method=method),
                timeout=timeout_s if self._timeout_s is None else self._timeout_s,
            )
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (*BROKEN, ValueError) as error:  # ValueError: a name that no address can have
            reason = getattr(error, "reason", error)
            raise HostError(
                f"{self.url} does not answer: {reason}. Is the host started?", status=0
            ) from error

    def lost(self, error: Exception) -> HostError:
        """The error for an answer that broke off."""
        return HostError(f"the connection to {self.url} was lost: {error}.", status=0)

    def patiently(self, ask: Callable[[], _Answer], *, patience_s: float | None = None) -> _Answer:
        """Call `ask` until the host answers. HostError once it was silent for too long."""
        patience_s = self.patience_s if patience_s is None else patience_s
        until = time.monotonic() + patience_s
        while True:
            try:
                return ask()
            except HostError as error:
                if error.status not in PASSING or not patience_s:
                    raise
                if time.monotonic() + POLL_S > until:
                    raise HostError(
                        f"{error} It was asked again for {patience_s:g} s.",
                        status=error.status,
                        body=error.body,
                    ) from error
            self._during_outage()
            time.sleep(POLL_S)

    def measure(self) -> dict[str, Any]:
        """Let the host time its methods and compare their images with one rank's: its table. Takes
        minutes.
        """
        return self._parse(self.open("/measure", method="POST", body={}), dict)

    def _object(self, path: str) -> dict[str, Any]:
        return self._parse(self.open(path), dict)

    def _parse(self, data: bytes, read: Callable[[Any], _Answer]) -> _Answer:
        try:
            return read(json.loads(data))
        except UNREADABLE as error:
            raise HostError(
                f"{self.url} answers, but not as a host of diffusion-launcher does. Is the "
                "address right?",
                status=0,
            ) from error

    def _refusal(self, error: urllib.error.HTTPError) -> HostError:
        body = _json_of(error)
        said = body.get("message") or body.get("error")
        if isinstance(said, dict):  # as OpenAI's routes answer
            said = said.get("message")
        if not isinstance(said, str):
            said = (
                f"{self.url} answered {error.code} {error.reason}, without the message of a host "
                "of diffusion-launcher. Is the address right?"
            )
        return HostError(said, status=error.code, body=body)


class Job:
    """A job on the host; `state` is the last look at it."""

    def __init__(self, client: Client, state: JobState) -> None:
        self._client = client
        self.state = state

    @property
    def id(self) -> str:
        return self.state.id

    def follow(self, *, previews: bool = False) -> Iterator[JobState]:
        """Its states, as they change, until it is over; with `previews` also small images of its
        steps.

        A host that restarts is waited for, as long as the client's patience lasts.
        """
        while True:
            try:
                yield from self._events(previews)
            except HostError as error:
                if error.status not in PASSING or not self._client.patience_s:
                    raise
            if self.state.is_over:
                return
            if not self._client.patience_s:
                raise self._client.lost(ConnectionError("the events ended before the job"))
            time.sleep(POLL_S)
            self.state = replace(self._client.patiently(self._look), preview=self.state.preview)
            yield self.state
            if self.state.is_over:
                return

    def wait(self) -> JobState:
        """Until it is over. HostError if it failed or was cancelled."""
        for _ in self.follow():
            pass
        if self.state.state != "done":
            raise self._failure()
        return self.state

    def result(self, accept: str = "*/*", *, frames_per_s: int | None = None) -> bytes:
        """The file, in the type of `accept`; a video at this speed."""
        speed = f"?fps={frames_per_s}" if frames_per_s is not None else ""
        return self._client.patiently(
            lambda: self._client.open(f"/v1/jobs/{self.id}/result{speed}", accept=accept)
        )

    def cancel(self, *, patience_s: float = 0.0) -> None:
        """It ends at its next step. patience_s: how long to ask a host that does not answer."""
        self._client.patiently(
            lambda: self._client.open(
                f"/v1/jobs/{self.id}", method="DELETE", timeout_s=LOOK_TIMEOUT_S
            ),
            patience_s=patience_s,
        )

    def abandon(self) -> None:
        """Cancel it from a thread of its own, also if the host answers only later. Never raises."""

        def ask() -> None:
            with contextlib.suppress(HostError):
                self.cancel(patience_s=self._client.patience_s)

        threading.Thread(target=ask, daemon=True).start()

    def _events(self, previews: bool) -> Iterator[JobState]:
        """Its states from one stream. HostError with status 0 if that breaks."""
        path = f"/v1/jobs/{self.id}/events?previews={int(previews)}"
        with self._client.stream(
            path, accept="text/event-stream", timeout_s=EVENTS_TIMEOUT_S
        ) as lines:
            try:
                for name, body in _events_of(lines):
                    self.state = _next_state(self.state, name, body)
                    yield self.state
            except BROKEN as error:
                raise self._client.lost(error) from error

    def _look(self) -> JobState:
        return self._client.state(self.id, timeout_s=LOOK_TIMEOUT_S)

    def _failure(self) -> HostError:
        """Its error with the HTTP status of its kind, which only its result has."""
        try:
            self._client.open(f"/v1/jobs/{self.id}/result", timeout_s=LOOK_TIMEOUT_S)
        except HostError as error:
            if error.status and error.body:
                return error
        return HostError(self.state.error or self.state.state, status=500)


def _events_of(lines: Iterator[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Server-sent events. A last one that was cut off is left out."""
    name = b""
    for line in lines:
        if line.startswith(b"event: "):
            name = line[7:].strip()
        elif line.startswith(b"data: ") and line.endswith(b"\n"):
            yield name, json.loads(line[6:])


def _next_state(state: JobState, event: bytes, body: dict[str, Any]) -> JobState:
    if event == b"preview":
        return replace(state, preview=base64.b64decode(body["image"].partition(",")[2]))
    return replace(JobState.read(body), preview=state.preview)


def _checked(url: str) -> str:
    """The address without a slash at its end. HostError if no host can be there."""
    text = url.strip().rstrip("/")
    try:
        parts = urlsplit(text)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one or not text.isprintable() or " " in text or parts.query or parts.fragment:
        raise HostError(
            f"the address {url!r} is not allowed. Give one such as http://127.0.0.1:6000.",
            status=0,
        )
    return text


def _json_of(error: urllib.error.HTTPError) -> dict[str, Any]:
    try:
        body = json.loads(error.read())
    except (*BROKEN, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
