"""A small client for a host of diffusion-launcher: the standard library only.

client = Client("http://127.0.0.1:6000")
job = client.submit(prompt="a red circle on a blue background", seed=1)
for state in job.follow():
    print(state.step, state.steps)
Path("circle.png").write_bytes(job.result())
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Client", "HostError", "Job", "JobState"]

OVER = frozenset({"done", "failed", "cancelled"})


class HostError(Exception):
    """What the host said, and its HTTP status (0 where nobody answered)."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """One look at a job. Times in seconds; settings are there once it is done."""

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

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @classmethod
    def read(cls, body: dict[str, Any]) -> "JobState":
        return cls(**{field.name: body[field.name] for field in fields(cls)})


class Client:
    """url: of the host. api_key: sent as a bearer token."""

    def __init__(self, url: str = "http://127.0.0.1:6000", *, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def submit(self, **fields: Any) -> "Job":
        """Queue a job; the fields are those of the host's /openapi.json. HostError if it is refused."""
        return Job(self, JobState.read(json.loads(self.open("/v1/jobs", method="POST", body=fields))))

    def generate(self, **fields: Any) -> bytes:
        """The finished picture (PNG) or video (MP4)."""
        job = self.submit(**fields)
        job.wait()
        return job.result()

    def job(self, job_id: str) -> "Job":
        """One that was submitted before."""
        return Job(self, JobState.read(json.loads(self.open(f"/v1/jobs/{job_id}"))))

    def schema(self) -> dict[str, Any]:
        """What the host takes, as OpenAPI."""
        return json.loads(self.open("/openapi.json"))

    def open(self, path: str, *, method: str = "GET", body: Any = None, accept: str = "*/*") -> bytes:
        """One request; the answer's body. HostError for anything but success."""
        with self.stream(path, method=method, body=body, accept=accept) as answer:
            return answer.read()

    def stream(self, path: str, *, method: str = "GET", body: Any = None, accept: str = "*/*") -> Any:
        """The same, open for reading as it comes."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Accept": accept, **({"Content-Type": "application/json"} if data is not None else {})}
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers, method=method))
        except urllib.error.HTTPError as error:
            raise HostError(_message(error), status=error.code) from error
        except urllib.error.URLError as error:
            raise HostError(f"{self.url} does not answer: {error.reason}. Is the host started?", status=0) from error


class Job:
    """A job on the host; `state` is the last look at it."""

    def __init__(self, client: Client, state: JobState) -> None:
        self._client = client
        self.state = state

    @property
    def id(self) -> str:
        return self.state.id

    def follow(self) -> Iterator[JobState]:
        """Its states, as they change, until it is over."""
        with self._client.stream(f"/v1/jobs/{self.id}/events", accept="text/event-stream") as lines:
            for line in lines:
                if line.startswith(b"data: "):
                    self.state = JobState.read(json.loads(line[6:]))
                    yield self.state

    def wait(self) -> JobState:
        """Until it is over. HostError if it failed or was cancelled."""
        for _ in self.follow():
            pass
        if self.state.state != "done":
            raise HostError(self.state.error or self.state.state, status=500)
        return self.state

    def result(self, accept: str = "*/*") -> bytes:
        """The file, in the type of `accept`."""
        return self._client.open(f"/v1/jobs/{self.id}/result", accept=accept)

    def cancel(self) -> None:
        """It ends at its next step."""
        self._client.open(f"/v1/jobs/{self.id}", method="DELETE")


def _message(error: urllib.error.HTTPError) -> str:
    try:
        body = json.loads(error.read())
    except ValueError:
        return f"{error.code} {error.reason}"
    return str(body.get("message") or body.get("error") or f"{error.code} {error.reason}")
