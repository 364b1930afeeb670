"""LocalAI backend: gRPC on one side, a host of diffusion-launcher on the other.

LocalAI starts it as `run.sh --addr HOST:PORT`.
"""

import argparse
import base64
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

HERE = Path(__file__).resolve().parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parent / "python"),
]  # backend.proto and the client library

from diffusion_client import HostError, Job  # noqa: E402  after the path is set
from model import Model, read_options  # noqa: E402

logger = logging.getLogger(__name__)

pb = grpc.protos("backend.proto")
"""Message classes, generated from the protocol file at import, so no generated code has to be
kept in step.
"""

SERVICE = "backend.Backend"
NUM_THREADS = 16
"""Each waiting image holds a thread, and Health and Status must still be answered."""
METHODS = {
    "Health": pb.HealthMessage,
    "Status": pb.HealthMessage,
    "LoadModel": pb.ModelOptions,
    "Free": pb.HealthMessage,
    "GenerateImage": pb.GenerateImageRequest,
    "GenerateVideo": pb.GenerateVideoRequest,
}
STATES = {"loading": pb.StatusResponse.UNINITIALIZED, "ready": pb.StatusResponse.READY}


class Backend:
    """The methods of the service, named as in the protocol. Errors are Results, as LocalAI
    expects.
    """

    def __init__(self) -> None:
        self._model = Model()
        self._loading = threading.Lock()

    def Health(self, request: Any, context: grpc.ServicerContext) -> Any:
        return pb.Reply(message=b"OK")

    def Status(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Return BUSY while an image is generated, and the memory of each rank in bytes."""
        client = self._model.client
        if client is None:
            return pb.StatusResponse(state=pb.StatusResponse.UNINITIALIZED)
        try:
            phase, ranks, jobs = (
                client.health()["phase"],
                client.settings().get("ranks_now", []),
                client.jobs(),
            )
        except HostError:
            return pb.StatusResponse(state=pb.StatusResponse.ERROR)
        state = STATES.get(phase, pb.StatusResponse.ERROR)
        if phase == "ready" and any(job.state == "running" for job in jobs):
            state = pb.StatusResponse.BUSY
        memory = {f"rank {rank['rank']}": rank["memory_bytes"] for rank in ranks}
        return pb.StatusResponse(
            state=state, memory=pb.MemoryUsageData(total=sum(memory.values()), breakdown=memory)
        )

    def LoadModel(self, request: Any, context: grpc.ServicerContext) -> Any:
        def load() -> str:
            with self._loading:
                self._model.load(read_options(request))
            return "model loaded"

        return _result(load)

    def Free(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _result(self._free)

    def GenerateImage(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _result(lambda: self._generate(self._image_fields(request), request.dst, context))

    def GenerateVideo(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _result(
            lambda: self._generate(
                self._video_fields(request), request.dst, context, fps=request.fps
            )
        )

    def close(self) -> None:
        self._free()

    def _free(self) -> str:
        with self._loading:
            self._model.free()
        return "model freed"

    def _generate(
        self, fields: dict[str, Any], dst: str, context: grpc.ServicerContext, *, fps: int = 0
    ) -> str:
        """Wait for the image or video and write it.

        A caller that gives up cancels it on all ranks.
        """
        given = {name: value for name, value in fields.items() if value not in (None, "", 0)}
        job = self._model.client.submit(**{**self._model.choice.defaults, **given})
        context.add_callback(lambda: _cancel(job))
        job.wait()
        Path(dst).write_bytes(job.result(frames_per_s=fps or None))
        return f"seed {job.state.seed}, {job.state.seconds:.1f} s"

    def _image_fields(self, request: Any) -> dict[str, Any]:
        fields = {
            "prompt": request.positive_prompt,
            "negative_prompt": request.negative_prompt,
            "height": request.height,
            "width": request.width,
            "num_inference_steps": request.step,
            "clip_skip": request.CLIPSkip,
            "seed": _seed(request.seed),
        }
        taken = self._taken()
        if request.ref_images and "ip_adapter_image" not in taken:
            raise HostError(
                "this host takes no reference images. Give the option ip_adapter, or leave them "
                "out.",
                status=0,
            )
        if request.ref_images:
            fields["ip_adapter_image"] = [_image(image) for image in request.ref_images]
        return fields | self._start(request.src, ("control_image", "image", "init_image"), taken)

    def _video_fields(self, request: Any) -> dict[str, Any]:
        taken = self._taken()
        if "num_frames" not in taken:
            raise HostError(
                "the model that is loaded makes no videos. Ask for an image, or load another.",
                status=0,
            )
        if request.end_image:
            raise HostError("end_image is not available. Leave it out.", status=0)
        fields = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "height": request.height,
            "width": request.width,
            "num_frames": request.num_frames,
            "num_inference_steps": request.step,
            "guidance_scale": request.cfg_scale,
            "seed": _seed(request.seed),
        }
        return fields | self._start(request.start_image, ("image", "control_image"), taken)

    def _start(self, source: str, names: tuple[str, ...], taken: dict[str, Any]) -> dict[str, Any]:
        """Return the start image under the first of these fields that the host takes."""
        if not source:
            return {}
        name = next((name for name in names if name in taken), None)
        if name is None:
            raise HostError(
                "the model that is loaded starts from no image. Leave it out.", status=0
            )
        strength = {"strength": self._model.choice.strength} if name == "init_image" else {}
        return {name: _image(source), **strength}

    def _taken(self) -> dict[str, Any]:
        if self._model.client is None:
            raise HostError("no model is loaded. Call LoadModel first.", status=0)
        return self._model.client.request_schema()["properties"]


def serve(address: str) -> tuple[grpc.Server, Backend, int]:
    """Return a started server, the backend and the port. An `address` ending in :0 picks a free
    port.
    """
    backend = Backend()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=NUM_THREADS))
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(backend, name),
            request_deserializer=kind.FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        )
        for name, kind in METHODS.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port(address)
    server.start()
    return server, backend, port


def main() -> int:
    parser = argparse.ArgumentParser(description="LocalAI backend for diffusion-launcher.")
    parser.add_argument("--addr", default="localhost:50051", help="where to listen")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server, backend, _ = serve(options.addr)
    logger.info("listening on %s", options.addr)
    stop.wait()
    server.stop(grace=None)
    backend.close()
    return 0


def _result(act: Callable[[], str]) -> Any:
    try:
        return pb.Result(success=True, message=act())
    except (HostError, OSError) as error:
        logger.warning("%s", error)
        return pb.Result(success=False, message=str(error))


def _cancel(job: Job) -> None:
    """Cancel the job at the end of each call, successful or not."""
    if not job.state.is_over:
        with contextlib.suppress(HostError):
            job.cancel()


def _seed(seed: int) -> int | None:
    """Return None for 0 or -1, which LocalAI sends if its caller gave no seed."""
    return seed if seed > 0 else None


def _image(source: str) -> str:
    """Return a file's content as base64. Other text is base64 already."""
    if not os.path.isfile(source):
        return source
    return base64.b64encode(Path(source).read_bytes()).decode("ascii")


if __name__ == "__main__":
    sys.exit(main())
