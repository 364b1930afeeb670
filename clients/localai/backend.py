"""LocalAI backend: gRPC on one side, a host of diffusion-launcher on the other. LocalAI starts it
as `run.sh --addr HOST:PORT`.
"""

import argparse
import base64
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import grpc

HERE = Path(__file__).resolve().parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parent / "python"),
]  # backend.proto, and the client library beside this folder

from diffusion_client import Client, HostError, Job  # noqa: E402  after the path is set
from model import Model, ModelChoice, read_options  # noqa: E402
from request_fields import require_available  # noqa: E402

logger = logging.getLogger(__name__)

pb = grpc.protos("backend.proto")
"""The messages, made of the protocol file by grpcio-tools: there is no generated code to keep in
step.
"""

SERVICE = "backend.Backend"
NUM_THREADS = 16
"""Each waiting image holds one, and Health and Status must still be answered."""
METHODS = {
    "Health": pb.HealthMessage,
    "Status": pb.HealthMessage,
    "LoadModel": pb.ModelOptions,
    "Free": pb.HealthMessage,
    "GenerateImage": pb.GenerateImageRequest,
    "GenerateVideo": pb.GenerateVideoRequest,
}
STATES = {"loading": pb.StatusResponse.UNINITIALIZED, "ready": pb.StatusResponse.READY}
CODES = {
    0: grpc.StatusCode.UNAVAILABLE,
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ABORTED,
    412: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP status -> gRPC status; any other one is INTERNAL."""


class Loaded(NamedTuple):
    """What one request uses. taken: the fields that the host reads, with their schemas."""

    choice: ModelChoice
    client: Client
    taken: dict[str, Any]


class Backend:
    """The methods of the service, by their names in the protocol.

    LocalAI reads the success of a Result after LoadModel only. What goes wrong in other calls ends
    them with a status of gRPC, as LocalAI would show an empty file otherwise.
    """

    def __init__(self) -> None:
        self._model = Model()
        self._loading = threading.Lock()

    def Health(self, request: Any, context: grpc.ServicerContext) -> Any:
        return pb.Reply(message=b"OK")

    def Status(self, request: Any, context: grpc.ServicerContext) -> Any:
        """BUSY while an image is drawn; memory in bytes, by rank."""
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
        def generate() -> str:
            loaded = self._loaded(request)
            return _generate(loaded, _image_fields(request, loaded), request.dst, context)

        return _or_abort(generate, context)

    def GenerateVideo(self, request: Any, context: grpc.ServicerContext) -> Any:
        def generate() -> str:
            loaded = self._loaded(request)
            return _generate(loaded, _video_fields(request, loaded), request.dst, context)

        return _or_abort(generate, context)

    def close(self) -> None:
        self._free()

    def _free(self) -> str:
        with self._loading:
            self._model.free()
        return "model freed"

    def _loaded(self, request: Any) -> Loaded:
        require_available(request)
        self._require_identity(request.ModelIdentity)
        try:
            return self._look()
        except HostError as error:
            if error.status:
                raise
        return self._look()  # it ended just now: start it again

    def _require_identity(self, identity: str) -> None:
        """Refuse a request for another model, in words by which LocalAI knows that it has called a
        backend at the port of one that has ended.
        """
        choice = self._model.choice
        if choice is not None and identity and choice.identity not in ("", identity):
            raise HostError(
                f"model identity mismatch: {choice.identity!r} is loaded here, not {identity!r}",
                status=404,
            )

    def _look(self) -> Loaded:
        with self._loading:
            choice, client = self._model.require()
        return Loaded(choice, client, client.request_schema()["properties"])


def serve(address: str) -> tuple[grpc.Server, Backend, int]:
    """A started server; the port is chosen if `address` ends in :0."""
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


def _generate(
    loaded: Loaded, fields: dict[str, Any], dst: str, context: grpc.ServicerContext
) -> str:
    """Wait for the image or video, and write it. A caller that gives up cancels it on all ranks."""
    job = loaded.client.submit(**{**loaded.choice.defaults, **fields})
    context.add_callback(lambda: _cancel(job))
    job.wait()
    Path(dst).write_bytes(job.result())
    return f"seed {job.state.seed}, {job.state.seconds:.1f} s"


def _image_fields(request: Any, loaded: Loaded) -> dict[str, Any]:
    fields = _given(
        prompt=request.positive_prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.step,
        clip_skip=request.CLIPSkip,
        seed=_seed(request.seed),
    )
    pair = _inpainting(request.src)
    source = request.src if pair is None else pair["image"]
    fields |= _start(source, ("control_image", "image", "init_image"), loaded, mask=pair)
    references = [_image(image) for image in request.ref_images]
    if pair is not None:  # LocalAI sends both of them here as well
        references = [image for image in references if image not in pair.values()]
    others = _references(references, loaded)
    if "image" in fields and "image" in others:
        others["image"] = [fields["image"], *others["image"]]
    return fields | others


def _video_fields(request: Any, loaded: Loaded) -> dict[str, Any]:
    if "num_frames" not in loaded.taken:
        raise HostError(
            "the model that is loaded makes no videos. Ask for an image, or load another.",
            status=400,
        )
    fields = _given(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        fps=request.fps,
        num_inference_steps=request.step,
        guidance_scale=request.cfg_scale,
        seed=_seed(request.seed),
    )
    fields |= _start(request.start_image, ("image", "control_image"), loaded)
    return fields | _params(request.params, fields)


def _given(**values: Any) -> dict[str, Any]:
    """The fields that LocalAI's caller has set: their protocol cannot tell 0 from nothing."""
    return {name: value for name, value in values.items() if value not in (None, "", 0)}


def _params(params: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Further fields of the host by their names there. Their texts are read as JSON where they are
    JSON.
    """
    for name in params:
        if name in fields:
            raise HostError(f"{name} is given twice: in params too. Give it once.", status=400)
    read = {}
    for name, text in params.items():
        try:
            read[name] = json.loads(text)
        except ValueError:
            read[name] = text
    return read


def _references(images: list[str], loaded: Loaded) -> dict[str, Any]:
    """Reference images go to the model itself if it takes images, else to the IP-Adapter."""
    if not images:
        return {}
    name = next((name for name in ("image", "ip_adapter_image") if name in loaded.taken), None)
    if name is None:
        raise HostError(
            "this host takes no reference images. Give the option ip_adapter, load a model that "
            "edits images, or leave them out.",
            status=400,
        )
    return {name: images}


def _start(
    source: str, names: tuple[str, ...], loaded: Loaded, *, mask: dict[str, str] | None = None
) -> dict[str, Any]:
    """The image to start from, as the first of these fields that the host takes. With a mask it is
    the image to inpaint.
    """
    if not source:
        return {}
    if mask is not None:
        names = ("init_image",) if "mask_image" in loaded.taken else ()
    name = next((name for name in names if name in loaded.taken), None)
    if name is None:
        does = "inpaints no image" if mask is not None else "starts from no image"
        raise HostError(f"the model that is loaded {does}. Leave it out.", status=400)
    strength = {"strength": loaded.choice.strength} if name == "init_image" else {}
    painted = {"mask_image": mask["mask_image"]} if mask is not None else {}
    return {name: _image(source), **strength, **painted}


def _inpainting(source: str) -> dict[str, str] | None:
    """The image and the mask, as base64, of the JSON file that LocalAI's inpainting sends; None for
    an image.
    """
    data = Path(source).read_bytes() if os.path.isfile(source) else b""
    if not data.lstrip().startswith(b"{"):
        return None
    try:
        content = json.loads(data)
        pair = {name: content[name] for name in ("image", "mask_image")}
    except (ValueError, LookupError, TypeError) as error:
        raise HostError(
            "src is a JSON file without image and mask_image. Send both, each as base64.",
            status=400,
        ) from error
    if not all(isinstance(value, str) and value for value in pair.values()):
        raise HostError(
            "image and mask_image of src must be texts. Send both, each as base64.", status=400
        )
    return pair


def _result(act: Callable[[], str]) -> Any:
    try:
        return pb.Result(success=True, message=act())
    except (HostError, OSError) as error:
        logger.warning("%s", error)
        return pb.Result(success=False, message=str(error))


def _or_abort(act: Callable[[], str], context: grpc.ServicerContext) -> Any:
    """Its Result; what goes wrong ends the call with a status that fits."""
    try:
        return pb.Result(success=True, message=act())
    except HostError as error:
        code, message = CODES.get(error.status, grpc.StatusCode.INTERNAL), str(error)
    except OSError as error:
        code, message = grpc.StatusCode.FAILED_PRECONDITION, str(error)
    except Exception as error:  # a caller that sees no error would show an empty file
        logger.exception("a request failed")
        code, message = grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"
    logger.warning("%s", message)
    return context.abort(code, message)


def _cancel(job: Job) -> None:
    """At the end of each call, well or not."""
    if not job.state.is_over:
        job.abandon()


def _seed(seed: int) -> int | None:
    """LocalAI sends 0 or -1 where its caller named none."""
    return seed if seed > 0 else None


def _image(source: str) -> str:
    """A file's content as base64; anything else is base64 already."""
    if not os.path.isfile(source):
        return source
    return base64.b64encode(Path(source).read_bytes()).decode("ascii")


if __name__ == "__main__":
    sys.exit(main())
