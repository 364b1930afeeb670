"""The WSGI application in the test's own process: Flask's client, and a thread in place of the rank
loop.
"""

import base64
import io
import threading

import numpy as np

from backends.model_table import read_table
from backends.request import GenerateResult
from hosts.compat.protocol import FixedModel
from hosts.http.app import Host, create_app
from hosts.launch.settings import Settings


def make_client(queue, state, **settings):
    values = {"type": "sdxl", **settings}
    return create_app(
        Host(
            settings=Settings.from_values(values),
            spec=read_table()[values["type"]],
            queue=queue,
            state=state,
            protocol=FixedModel(),
        )
    ).test_client()


def answer_jobs(queue, *, num_frames=1, latents=True, error=None):
    """Finish every job of the queue, in the background."""

    def run():
        while (job := queue.next()) is not None:
            if error is not None:
                queue.finish(job, error=error)
                continue
            queue.finish(
                job,
                result=GenerateResult(
                    frames=np.full((num_frames, 16, 24, 3), 128, dtype=np.uint8),
                    latents=np.zeros((1, 4, 2, 3), dtype=np.float32) if latents else None,
                    seed=job.request.seed,
                    num_steps=2,
                    exactness="exact",
                    seconds=0.1,
                ),
            )

    threading.Thread(target=run, daemon=True).start()


def encode_file(sample_image):
    buffer = io.BytesIO()
    sample_image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
