"""SECURITY.md names a test for each line of its tables, and what it says of no single module."""

import re
import threading
from pathlib import Path

import pytest

from hosts.http import decode
from hosts.jobs.queue import JobQueue
from hosts.supervision.host_state import HostState, Phase
from tests.checkpoints import sample_image
from tests.hosts.application import encode_file, make_client
from tests.hosts.harness import wait_until

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    line
    for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| party |", "| threat |"))
]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`")


def title(row):
    return row.split("|")[1].strip()[:50]


def test_the_page_has_its_tables():
    assert len(ROWS) == 25


@pytest.mark.parametrize("row", ROWS, ids=title)
def test_each_row_names_tests_that_exist(row):
    named = NAMED.findall(row.split("|")[-2])
    assert named
    assert row.count("::") == sum(bool(test) for _, test in named)
    for path, test in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {test or r'test_'}", text, re.MULTILINE), f"{path}::{test}"


@pytest.fixture
def state():
    made = HostState()
    made.become(Phase.READY)
    return made


@pytest.mark.parametrize("type_name", ["sdxl", "svd"])
def test_get_changes_nothing(type_name, state):
    """On any route, with the id of a job that waits."""
    queue = JobQueue()
    client = make_client(queue, state, type=type_name)
    fields = {"image": encode_file(sample_image(16))} if type_name == "svd" else {"prompt": "a"}
    sent = client.post("/v1/jobs", json=fields)
    assert sent.status_code == 202, sent.text
    before = sent.get_json()["id"]
    asked = 0
    for rule in client.application.url_map.iter_rules():
        if "GET" in rule.methods:
            path = re.sub(r"<[^>]*>", before, rule.rule)
            client.get(path, buffered=False).close()
            asked += 1
    assert asked > 20 and state.phase is Phase.READY
    (job,) = queue.jobs()
    assert (job.id, queue.num_waiting, job.cancel_requested) == (before, 1, False)
    assert not queue.is_closed


@pytest.mark.parametrize(
    "job_id", ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "/etc/passwd", "jobs.sqlite"]
)
def test_ids_of_jobs_lead_to_no_file(job_id, state):
    client = make_client(JobQueue(), state)
    for path in ("/v1/jobs/{}", "/v1/jobs/{}/result", "/v1/jobs/{}/trace", "/v1/videos/{}/content"):
        answer = client.get(path.format(job_id))
        assert answer.status_code in (404, 410) and "root:" not in answer.text, answer.text


def test_four_requests_are_decoded_at_a_time():
    running, most, release = [], [], threading.Event()

    def read():
        running.append(1)
        most.append(len(running))
        release.wait(20)
        running.pop()

    threads = [
        threading.Thread(target=decode.decoded, args=(read,), kwargs={"field": "", "wanted": ""})
        for _ in range(9)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(running) == 4, within_s=10, what="four are decoded")
    release.set()
    for thread in threads:
        thread.join(20)
    assert len(most) == 9 and max(most) == 4


def test_every_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line.strip() and not line.startswith("#")]
    assert pinned and all(re.match(r"[\w.\[\]-]+==[\w.+]+", line) for line in pinned)
    assert re.search(r"^audit:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
