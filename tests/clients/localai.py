"""What LocalAI does with a backend: calls by their full names, messages by their field numbers."""

import grpc
import pytest

from tests.hosts.harness import REPOSITORY

FOLDER = REPOSITORY / "clients" / "localai"
ANSWERS = {"Health": "Reply", "Status": "StatusResponse"}


class LocalAI:
    """A caller of the backend at this port."""

    def __init__(self, port, messages):
        self.pb = messages
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    def start(self, method, request):
        kind = getattr(self.pb, ANSWERS.get(method, "Result"))
        call = self._channel.unary_unary(
            f"/backend.Backend/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=kind.FromString,
        )
        return call.future(request, timeout=120)

    def call(self, method, request=None):
        return self.start(
            method, request if request is not None else self.pb.HealthMessage()
        ).result()

    def load(self, **fields):
        return self.call("LoadModel", self.pb.ModelOptions(**fields))

    def close(self):
        self._channel.close()


def failure(client, method, **fields):
    """The call's gRPC status and what it says."""
    with pytest.raises(grpc.RpcError) as caught:
        client.call(method, getattr(client.pb, f"{method}Request")(**fields))
    return caught.value.code(), caught.value.details()
