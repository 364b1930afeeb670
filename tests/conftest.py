"""Fixtures for all tests: ranks in processes of their own, and guards that fail a test which leaves
something behind.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# gRPC's handlers in a forked child wake its threads there, which broke ffmpeg's pipes
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hosts.ranks.libraries import import_bitsandbytes

import_bitsandbytes(os.environ)
torch.set_num_threads(1)
multiprocessing.set_forkserver_preload(["tests.conftest", "tests.preload"])


def _rank_entry(
    rank: int, world_size: int, folder: Path, check: Callable[..., None], args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
        )
        torch.manual_seed(0)  # same weights and inputs on every rank
        check(rank, world_size, *args)
    except BaseException:
        (folder / f"{time.monotonic_ns()}-rank{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


HOSTS = {"start_launcher", "start_client_host", "start_cluster"}
"""What starts processes for a whole host, by the names under which test files import it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first, as they are handed out to workers whole: then no worker ends long
    after the others.
    """
    hosts, ranks = set(), set()
    for item in items:
        if HOSTS & vars(item.module).keys():
            hosts.add(item.path)
        elif "run_on_ranks" in item.fixturenames:
            ranks.add(item.path)
    items.sort(key=lambda item: (item.path not in hosts, item.path not in ranks))


@pytest.fixture
def run_on_ranks(tmp_path: Path) -> Callable[..., None]:
    """run(check, world_size, *args): `check(rank, world_size, *args)` on that many gloo ranks; the
    first failure is shown first.
    """

    def run(check: Callable[..., None], world_size: int, *args: Any) -> None:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))  # a fresh rendezvous for each call
        try:
            mp.start_processes(
                _rank_entry,
                (world_size, folder, check, args),
                nprocs=world_size,
                start_method="forkserver",
            )
        except Exception as error:  # whatever ended a rank: its own report says what
            # the rank that torch names is often the victim ("connection reset"), not the culprit,
            # so the reports are sorted by time
            reports = [
                p.stem.split("-")[1] + "\n" + p.read_text()
                for p in sorted(folder.glob("*-rank*.txt"))
            ]
            pytest.fail("first failure first\n" + "\n".join(reports or [str(error)]), pytrace=False)

    return run


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    assert not dist.is_initialized(), "the test left a process group open"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A model hub on this machine (tests/hub_server.py), and an empty cache for this process."""
    from tests.hub_server import HubServer

    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server
