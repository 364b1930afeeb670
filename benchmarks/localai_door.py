"""The LocalAI backend before a host, for benchmarks.hostile: fields as JSON would have them become
messages of its protocol, and the status of a call a status of HTTP.
"""

import importlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from tests.clients.localai import FOLDER, LocalAI

STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 412,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
}
"""Any other one is 500."""
WRITTEN = "dst"
"""Where the backend writes: a file of ours, whatever the field would be."""
INT32 = 2**31


def backend() -> Any:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("backend")


def fields_of(method: str) -> tuple[str, ...]:
    """Return the fields of the request of a method, but for WRITTEN."""
    fields = getattr(backend().pb, f"{method}Request").DESCRIPTOR.fields
    return tuple(field.name for field in fields if field.name != WRITTEN)


class Door:
    """A LocalAI that sends requests to the backend."""

    def __init__(self, client: LocalAI, folder: Path) -> None:
        self._client, self._folder = client, folder

    def send(self, method: str, content: Mapping[str, Any]) -> tuple[int, str]:
        """Return the status and what the call says."""
        message = getattr(self._client.pb, f"{method}Request")()
        for name, value in content.items():
            _set(message, name, value)
        message.dst = str(self._folder / "made")
        try:
            return 200, str(self._client.call(method, message).message)
        except grpc.RpcError as error:
            return STATUS.get(error.code(), 500), f"{error.code()}: {error.details()}"


@contextmanager
def opened(url: str, model_type: str) -> Iterator[Door]:
    """A backend that has loaded the host at this address."""
    module = backend()
    server, service, port = module.serve("127.0.0.1:0")
    client = LocalAI(port, module.pb)
    try:
        answer = client.load(PipelineType=model_type, Options=[f"url:{url}", "strength:0.5"])
        assert answer.success, answer.message
        with tempfile.TemporaryDirectory() as folder:
            yield Door(client, Path(folder))
    finally:
        client.close()
        server.stop(grace=None).wait()
        service.close()


def _set(message: Any, name: str, value: Any) -> None:
    """Set a field as far as its type can have the value; others stay as they are."""
    field = message.DESCRIPTOR.fields_by_name.get(name)
    if field is None or name == WRITTEN:
        return
    part = getattr(message, name)
    try:
        if hasattr(part, "update"):  # a map of texts
            entries = value.items() if isinstance(value, Mapping) else ()
            part.update({str(key): str(each) for key, each in entries})
        elif hasattr(part, "extend"):
            part.extend([str(each) for each in (value if isinstance(value, list) else [value])])
        elif isinstance(part, str):
            setattr(message, name, "" if value is None else str(value))
        elif isinstance(part, int) and isinstance(value, int):
            setattr(message, name, max(-INT32, min(INT32 - 1, value)))
        elif isinstance(part, float):
            setattr(message, name, float(value))
    except (TypeError, ValueError, OverflowError):  # such as half a character
        return
