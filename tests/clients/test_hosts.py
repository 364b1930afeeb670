"""The host scripts as the existing clients start them: real torchrun, their command lines, their
bodies, their kill.
"""

import signal
import threading

import numpy as np
import psutil
import pytest
import requests

from tests.checkpoints import checkpoint
from tests.hosts.bodies import COMFYUI_TEXT
from tests.hosts.client import assert_is_error, decode
from tests.hosts.harness import free_port, is_port_free, start_client_host, wait_until

GOLDEN = (
    "--variant=fp32", "--width=64", "--height=64", "--enable_vae_tiling", "--warm_up_steps=2",
    '--scheduler={"scheduler": "dpmpp_2m", "use_karras_sigmas": true}', "--type=sdxl",
    "--model_n=2", "--stride=1",
    "--left_over=from_another_node",
)  # fmt: skip
NUM_REQUESTS = 60


def test_asyncdiff_host_of_comfyui_from_start_to_kill():
    arguments = (*GOLDEN, f"--checkpoint={checkpoint('sdxl')}")
    with start_client_host("host_asyncdiff.py", *arguments, num_ranks=2) as host:
        host.wait_until_ready()
        assert host.get("/initialize").text == "OK"

        body = host.post(COMFYUI_TEXT).json()
        assert set(body) == {"message", "output", "latent", "is_image"} and body["message"] == "OK"
        assert np.asarray(decode(body["output"])).std() > 1
        assert tuple(decode(body["latent"]).shape) == (1, 4, 8, 8)

        assert "left_over" in host.log and "is not an argument of this host: ignored" in host.log

        for _ in range(NUM_REQUESTS):
            requests.get(
                host.url("/progress"), timeout=20
            )  # a connection each, as the clients make them
        lingering = [
            c.status
            for c in psutil.net_connections("tcp")
            if c.laddr.port == host.port and c.status in _LINGERING
        ]
        assert lingering == []

        family = host.tree()
        job = threading.Thread(target=_post_and_lose, args=(host,), daemon=True)
        job.start()
        wait_until(lambda: float(host.get("/progress").text) > 0, within_s=60, what="the job runs")
        host.session.close()
        assert host.signal_and_wait(signal.SIGKILL, within_s=3) < 3
        assert not [
            process
            for process in family
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]
        wait_until(lambda: is_port_free(host.port), within_s=4, what="the port can be bound")
        job.join(timeout=10)


_LINGERING = {psutil.CONN_TIME_WAIT, psutil.CONN_FIN_WAIT2}


def test_host_that_cannot_load_says_why_to_every_request_and_the_next_one_waits_for_its_port():
    """The clients notice neither an exit nor a log, only answers."""
    port = free_port()
    with start_client_host(
        "host_xdit.py", "--type=flux", "--variant=fp32", "--checkpoint=/nowhere/flux", port=port
    ) as first:
        first.wait_until_ready()
        arguments = ("--type=sdxl", "--variant=fp32", "--checkpoint=/nowhere/sdxl")
        with start_client_host("host_distrifuser.py", *arguments, port=port) as second:
            for _ in range(2):
                message = assert_is_error(first.post({"positive": "a dog", "steps": 2}).json())
                assert "/nowhere/flux does not exist" in message
            first.session.close()
            first.signal_and_wait(signal.SIGKILL, within_s=3)
            wait_until(
                lambda: "listening on" in second.log,
                within_s=60,
                what="the second has taken over the port",
            )
            assert second.status() == 200
            assert second.signal_and_wait(signal.SIGTERM, within_s=10) < 10


def _post_and_lose(host):
    try:
        requests.post(host.url("/generate"), json={**COMFYUI_TEXT, "steps": 900}, timeout=60)
    except requests.ConnectionError:
        return


@pytest.mark.parametrize("arguments", [(), ("--type=sdxl",)], ids=["no model", "a model"])
def test_host_of_a_client_without_a_key_is_not_within_reach_of_others(arguments):
    """Others could end it with a GET. It says why on this machine."""
    with start_client_host("host_single.py", "--host=0.0.0.0", *arguments) as host:
        host.wait_until_listening()
        listening = [
            connection.laddr.ip
            for process in host.tree()
            for connection in process.net_connections("tcp")
            if connection.status == "LISTEN" and connection.laddr.port == host.port
        ]
        assert listening and set(listening) <= {"127.0.0.1", "::1"}
        assert "--host=0.0.0.0 can be reached from other machines" in host.get("/healthz").text
