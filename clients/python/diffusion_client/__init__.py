"""A small client for a host of diffusion-launcher. It needs only the standard library.

client = Client("http://127.0.0.1:6000")
job = client.submit(prompt="a red circle on a blue background", seed=1)
for state in job.follow():
    print(state.step, state.steps)
Path("circle.png").write_bytes(job.result())

diffusion_client.local starts a host on this machine.
"""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

__all__ = ["Client", "HostError", "Job", "JobState"]

OVER = frozenset({"done", "failed", "cancelled"})


class HostError(Exception):
    """An error of the host: message, HTTP status (0 if it did not answer) and JSON body."""

    def __init__(self, message: str, *, status: int, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body or {}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """A snapshot of a job. Times are in seconds."""

    id: str
    state: str
    position: int
    step: int
    steps: int
    seconds: float | None
    eta: float | None
    seed: int
    exactness: str | None
    settings: dict[str, Any] | None  # None until the job is done
    error: str | None
    preview: bytes | None = None  # small JPEG of the last step, if requested

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @classmethod
    def read(cls, body: dict[str, Any]) -> "JobState":
        return cls(
            **{field.name: body[field.name] for field in fields(cls) if field.name != "preview"}
        )


class Client:
    """The client of one host."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:6000",
        *,
        api_key: str | None = None,
        timeout_s: float | None = None,
        uses_proxies: bool = True,
    ) -> None:
        """url: of the host. api_key: sent as a bearer token. timeout_s: longest pause in a
        response; None waits without limit. uses_proxies: whether to use the environment's
        proxies.
        """
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(None if uses_proxies else {})
        )
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def submit(self, *, idempotency_key: str | None = None, **fields: Any) -> "Job":
        """Queue a job. Its fields are in the host's /openapi.json. HostError if it is refused.

        idempotency_key: a name for the job. The same name with the same fields returns the existing
        job.
        """
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key is not None else {}
        return Job(
            self,
            JobState.read(
                json.loads(self.open("/v1/jobs", method="POST", body=fields, headers=headers))
            ),
        )

    def generate(self, **fields: Any) -> bytes:
        """Return the finished image (PNG) or video (MP4)."""
        job = self.submit(**fields)
        job.wait()
        return job.result()

    def job(self, job_id: str) -> "Job":
        """Return a job that was submitted before."""
        return Job(self, JobState.read(json.loads(self.open(f"/v1/jobs/{job_id}"))))

    def health(self) -> dict[str, Any]:
        """Return the phase (loading, ready, failed, stopping), its reason and the number of
        waiting jobs.
        """
        try:
            return json.loads(self.open("/healthz"))
        except HostError as error:
            if error.status != 503:
                raise
            return error.body

    def cluster(self) -> dict[str, Any]:
        """Return the models of a gateway and their replicas, or a single host's health."""
        try:
            return json.loads(self.open("/cluster"))
        except HostError as error:
            if error.status != 404:
                raise
            return self.health()

    def jobs(self) -> list[JobState]:
        """Return all jobs of the host (running, waiting, finished), without their settings."""
        return [
            JobState.read({"settings": None, **job})
            for job in json.loads(self.open("/v1/jobs"))["jobs"]
        ]

    def trace(self, job_id: str) -> dict[str, Any]:
        """Return the activity of every rank over time as a Chrome trace."""
        return json.loads(self.open(f"/v1/jobs/{job_id}/trace"))

    def models(self) -> list[str]:
        """Return the names of the models that the host serves."""
        return [model["id"] for model in json.loads(self.open("/v1/models"))["data"]]

    def settings(self) -> dict[str, Any]:
        """Return what the host serves, on how many ranks, and why."""
        return json.loads(self.open("/settings"))

    def schema(self) -> dict[str, Any]:
        """Return the host's OpenAPI document."""
        return json.loads(self.open("/openapi.json"))

    def request_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the fields that the host takes for its model."""
        return self.schema()["components"]["schemas"]["Request"]

    def open(
        self,
        path: str,
        *,
        method: str = "GET",
        body: Any = None,
        accept: str = "*/*",
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Send a request and return the response body. HostError unless it succeeds."""
        with self.stream(path, method=method, body=body, accept=accept, headers=headers) as answer:
            return answer.read()

    def stream(
        self,
        path: str,
        *,
        method: str = "GET",
        body: Any = None,
        accept: str = "*/*",
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Like `open`, but return a response to read as it arrives."""
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if data is not None else {}
        sent = {**self._headers, "Accept": accept, **kind, **(headers or {})}
        try:
            return self._opener.open(
                urllib.request.Request(self.url + path, data, sent, method=method),
                timeout=self._timeout_s,
            )
        except urllib.error.HTTPError as error:
            body = _json_of(error)
            said = body.get("message") or body.get("error") or f"{error.code} {error.reason}"
            raise HostError(str(said), status=error.code, body=body) from error
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise HostError(
                f"{self.url} does not answer: {reason}. Is the host started?", status=0
            ) from error


class Job:
    """A job on the host. `state` is its latest snapshot."""

    def __init__(self, client: Client, state: JobState) -> None:
        self._client = client
        self.state = state

    @property
    def id(self) -> str:
        return self.state.id

    def follow(self, *, previews: bool = False) -> Iterator[JobState]:
        """Yield its states as they change, until it is over. previews: with small images of its
        steps.
        """
        name = b""
        with self._client.stream(
            f"/v1/jobs/{self.id}/events?previews={int(previews)}", accept="text/event-stream"
        ) as lines:
            for line in lines:
                if line.startswith(b"event: "):
                    name = line[7:].strip()
                elif line.startswith(b"data: "):
                    self.state = _next_state(self.state, name, json.loads(line[6:]))
                    yield self.state

    def wait(self) -> JobState:
        """Block until it is over and return its state. HostError if it failed or was cancelled."""
        for _ in self.follow():
            pass
        if self.state.state != "done":
            raise HostError(self.state.error or self.state.state, status=500)
        return self.state

    def result(self, accept: str = "*/*", *, frames_per_s: int | None = None) -> bytes:
        """Return the file in the type of `accept`. frames_per_s: speed of a video."""
        speed = f"?fps={frames_per_s}" if frames_per_s is not None else ""
        return self._client.open(f"/v1/jobs/{self.id}/result{speed}", accept=accept)

    def cancel(self) -> None:
        """Cancel the job: it ends at its next step."""
        self._client.open(f"/v1/jobs/{self.id}", method="DELETE")


def _next_state(state: JobState, event: bytes, body: dict[str, Any]) -> JobState:
    if event == b"preview":
        return replace(state, preview=base64.b64decode(body["image"].partition(",")[2]))
    return replace(JobState.read(body), preview=state.preview)


def _json_of(error: urllib.error.HTTPError) -> dict[str, Any]:
    try:
        body = json.loads(error.read())
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
