"""What a host would generate for a request: the GenerateRequest that its dialect makes of it."""

import threading

import numpy as np

from backends.errors import UnavailableError
from backends.request import GenerateResult
from hosts.jobs.queue import JobQueue
from hosts.jobs.serialization import fingerprint
from hosts.supervision.host_state import HostState, Phase
from tests.hosts.application import make_client


class ReadingHost:
    """The WSGI application over a queue whose jobs end at once. A context manager."""

    def __init__(self, num_frames=1, **settings):
        self._num_frames = num_frames
        self.state, self.queue, self.requests = HostState(), JobQueue(), []
        self.state.become(Phase.READY)
        self.report = {}
        """Of each result."""
        self.hold = threading.Event()
        """While it is not set, no job ends."""
        self.hold.set()
        self.client = make_client(self.queue, self.state, **settings)

    def __enter__(self):
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.queue.close(UnavailableError("the test is over"))
        self._thread.join(timeout=20)

    def _answer(self):
        while (job := self.queue.next()) is not None:
            self.requests.append(job.request)
            self.hold.wait(60)
            for step in (1, 2, 3, 4):
                preview = np.full((2, 3, 3), 50 * step, np.uint8) if job.wants_preview else None
                self.queue.record_step(job, step, 4, preview)
            frames = np.random.default_rng(0).integers(
                0, 256, (self._num_frames, 16, 24, 3), dtype=np.uint8
            )
            facts = {"guidance_scale": 5.0, "num_inference_steps": 4, "scheduler": "EulerScheduler"}
            result = GenerateResult(
                frames=frames, latents=np.zeros((1, 4, 2, 3), np.float32),
                seed=job.request.seed, num_steps=4,
                exactness="exact", seconds=0.1, resolved=facts, report=self.report,
            )  # fmt: skip
            self.queue.finish(job, result=result)

    def post(self, path, body, **kwargs):
        return self.client.post(path, json=body, **kwargs)

    def reads(self, path, body, **kwargs):
        """The requests that it makes of the body, which must be accepted."""
        for job in self.queue.jobs(owner=None):
            job.finished.wait(60)  # those of posts that were not waited for
        before = len(self.requests)
        answer = self.post(path, body, **kwargs)
        assert answer.status_code in (200, 202), answer.get_data(as_text=True)
        while len(self.requests) == before:
            threading.Event().wait(0.01)
        return self.requests[before:]

    def is_same(self, path, body, wanted):
        """Whether the body asks for what `wanted` asks of /v1/jobs."""
        mine, ours = self.reads(path, body)[0], self.reads("/v1/jobs", wanted)[0]
        return fingerprint(mine) == fingerprint(ours)


def message_of(answer):
    """The message of an error, in any dialect's shape."""
    body = answer.get_json()
    if "error" in body and isinstance(body["error"], dict):
        assert set(body) == {"error"}, body
        return body["error"]["message"]
    return body["detail"] if "detail" in body else body["message"]


def param_of(answer):
    """The field at fault, in the dialect that tells it apart from the message: OpenAI's."""
    error = answer.get_json().get("error")
    return error["param"] if isinstance(error, dict) else None
