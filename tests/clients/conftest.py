"""The LocalAI backend over a real gRPC channel, before a real host."""

import importlib
import sys

import pytest

from tests.checkpoints import checkpoint
from tests.clients.localai import FOLDER, LocalAI
from tests.hosts.inprocess import InProcessHost


@pytest.fixture(scope="module")
def backend():
    before, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("backend")
    sys.path[:] = before
    for name in {"backend", "model", "request_fields"} - modules:
        sys.modules.pop(name, None)


@pytest.fixture
def localai(backend):
    server, service, port = backend.serve("127.0.0.1:0")
    client = LocalAI(port, backend.pb)
    yield client
    client.close()
    server.stop(grace=None).wait()
    service.close()


@pytest.fixture(scope="module")
def host():
    with InProcessHost(type="sdxl", checkpoint=str(checkpoint("sdxl"))) as running:
        yield running


@pytest.fixture
def loaded(localai, host):
    answer = localai.load(
        PipelineType="sdxl", CFGScale=6.0, Options=[f"url:{host.url('')}", "strength:0.5"]
    )
    assert answer.success, answer.message
    return localai
