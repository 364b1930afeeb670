"""The v2 protocol on real ranks: one host that is started without a model, then loads,
changes and unloads it over HTTP.

The tests of `host` use one host of two ranks, in this order.
"""

import json
import sys
import time

import numpy as np
import pytest
import requests
import torch

from tests.altered import without_a_weight
from tests.backends.features import TABLE, loaded
from tests.checkpoints import checkpoint
from tests.hosts.client import assert_is_error, decode, encode
from tests.hosts.harness import (
    CLIENT_FOLDER,
    READY_WITHIN_S,
    _started,
    assert_port_is_free,
    free_port,
    start_client_host,
    wait_until,
)

STEPS = 4
GENERATE = {
    "width": 64, "height": 64, "seed": 7, "steps": STEPS, "cfg": 7.0, "clip_skip": 0,
    "denoising_start": 0, "denoising_end": 2**32 - 1,
    "positive": "a dog", "negative": "", "use_compel": False, "scheduler": '{"scheduler": "ddim"}',
}  # fmt: skip


def configuration(name, **others):
    """What the client sends: its golden body, with as many synchronous steps as there are, so that
    AsyncDiff is exact.
    """
    return {
        "backend_config": {"model_n": 2, "stride": 1, "time_shift": False, "synced_steps": 10,
            "synced_percent": 100.0},
        "checkpoint": {"checkpoint": str(checkpoint(name))}, "pipeline_type": name,
        "variant": "fp32", "vae_fp16": False,
        "enable_vae_tiling": False, "enable_vae_slicing": False, "enable_attention_slicing": False,
        "xformers_efficient": False, **others,
    }  # fmt: skip


@pytest.fixture(scope="module")
def host():
    sizes = ("--height=64", "--width=64")  # for what is tried at load
    with start_client_host("host_asyncdiff.py", *sizes, "--mode=auto", num_ranks=2) as running:
        yield running


def send(host, path, body=None, *, get=False, timeout=READY_WITHIN_S, **kwargs):
    call = requests.get if get else requests.post
    return call(
        host.url(path), timeout=timeout, **({} if body is None else {"json": body}), **kwargs
    )


def apply(host, body):
    answer = send(host, "/apply", body)
    assert (answer.status_code, answer.text) == (200, ""), answer.text


def drawn(host, **fields):
    answer = host.post({**GENERATE, **fields})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return np.asarray(decode(body["output"])).astype(int), decode(body["latent"])


@pytest.fixture(scope="module")
def alone():
    """Type -> the same image by one rank, and its latents."""
    from backends.request import GenerateRequest

    def draw(name):
        fields = {
            "prompt": "a dog",
            "seed": 7,
            "num_inference_steps": STEPS,
            "guidance_scale": 7.0,
            "height": 64,
            "width": 64,
        }
        made = loaded(TABLE[name]).generate(GenerateRequest(**fields, scheduler="ddim"))
        return made.frames[0].astype(int), made.latents

    return {name: draw(name) for name in ("sdxl", "sd1")}


def test_host_without_a_model_answers_at_once_and_says_what_it_needs(host):
    host.wait_until_ready()
    assert host.get("/initialize").text == "OK" and host.get("/applied").text == "None"
    assert (host.get("/healthz").json()["phase"], host.get("/readyz").status_code) == ("empty", 503)
    assert host.get("/v1/models").json()["data"] == []
    for path in ("/generate", "/v1/jobs"):
        answer = send(host, path, GENERATE)
        assert (
            answer.status_code == 503
            and "no pipeline is loaded. Send its configuration to POST /apply"
            in assert_is_error(answer.json())
        )
    answer = host.get("/offload")
    assert answer.status_code == 500 and "no pipeline is loaded" in assert_is_error(answer.json())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"pipeline_type": "nonsense"}, "type='nonsense' is not a model type"),
        ({"pipeline_type": "sdxl"}, "checkpoint is missing or no text"),
        (
            {"pipeline_type": "sdxl", "checkpoint": {"checkpoint": "/nowhere"}},
            "--checkpoint=/nowhere does not exist",
        ),
        ({"text_encoder": {"checkpoint": "/x"}}, "separate text encoders are not available"),
        ({"quantization_config": {"transformer": {"backend": "sdnq"}}}, "asks for 'sdnq'"),
        ({"backend_config": {"model_n": 3}}, "model_n"),
        ({"vae": {"nonsense": 1}}, "vae must be"),
        ({"lora": [1]}, "--lora"),
    ],
)
def test_wrong_configuration_is_refused_with_the_reason(host, body, message):
    full = body if "pipeline_type" in body else {**configuration("sdxl"), **body}
    answer = send(host, "/apply", full)
    assert answer.status_code == 500 and message in assert_is_error(answer.json())
    assert host.get("/applied").text == "None" and host.status() == 200


def test_pipeline_is_loaded_and_both_ranks_draw_what_one_does(host, alone):
    body = configuration("sdxl")
    apply(host, body)
    assert host.get("/applied").json() == body and host.get("/progress").text == "100"
    assert host.get("/v1/models").json()["data"][0]["id"] == "sdxl"
    facts = host.get("/settings").json()
    assert (facts["type"], facts["backend"], facts["ranks"], facts["checkpoint"]) == (
        "sdxl",
        "asyncdiff",
        2,
        str(checkpoint("sdxl")),
    )
    sample_image, latent = drawn(host)
    assert np.abs(sample_image - alone["sdxl"][0]).max() <= 1
    assert [rank["rank"] for rank in host.get("/settings").json()["ranks_now"]] == [0, 1]
    scale = json.loads((checkpoint("sdxl") / "vae" / "config.json").read_text())["scaling_factor"]
    np.testing.assert_allclose(latent.numpy(), alone["sdxl"][1] * scale, atol=1e-3)  # model space
    started = time.monotonic()
    apply(host, body)
    assert time.monotonic() - started < 1, "the same configuration was loaded again"


def test_steps_are_counted_and_a_run_goes_on_where_another_ended(host):
    whole, _ = drawn(host)
    _, half = drawn(host, denoising_end=2)
    rest, _ = drawn(host, denoising_start=2, latent=encode(half))
    assert np.abs(rest - whole).max() <= 1
    other, _ = drawn(host, denoising_start=2, latent=encode(torch.zeros_like(half)))
    assert np.abs(other - whole).max() > 5
    refused = host.post({**GENERATE, "denoising_start": 0.5})
    assert refused.status_code == 400 and "denoising_start=0.5 is not allowed" in assert_is_error(
        refused.json()
    )


def test_compel_is_used_by_the_requests_that_say_so(host):
    plain, _ = drawn(host, positive="a (dog)1.8")
    weighed, _ = drawn(host, positive="a (dog)1.8", use_compel=True)
    assert np.abs(plain - weighed).max() > 5


def test_offloaded_weights_come_back_for_the_next_image(host, alone):
    assert (host.get("/offload").status_code, host.get("/offload").text) == (
        200,
        "the weights are in main memory",
    )
    assert np.abs(drawn(host)[0] - alone["sdxl"][0]).max() <= 1


def test_sleeping_ranks_let_the_next_job_wait(host, alone):
    started = time.monotonic()
    answer = send(host, "/sleep", {"sleep": True, "time": 2})
    assert (answer.status_code, answer.text) == (200, "") and time.monotonic() - started < 1.5
    assert np.abs(drawn(host)[0] - alone["sdxl"][0]).max() <= 1
    assert time.monotonic() - started > 2
    refused = send(host, "/sleep", {"sleep": True, "time": -1})
    assert refused.status_code == 400 and "time=-1 is not allowed" in assert_is_error(
        refused.json()
    )


def test_another_pipeline_takes_its_place_after_the_jobs_that_run_on_a_rank_each(host, alone):
    ranks = host.ranks()
    # loaded anew, so that no measured time decides whether two jobs are for a rank each
    apply(host, {})
    apply(host, configuration("sdxl"))
    assert list(host.get("/settings").json()["teams"]) == ["1"]
    body = {"prompt": "a dog", "width": 64, "height": 64}
    bodies = [{**body, "num_inference_steps": steps} for steps in (10, 40, 40)]
    jobs = [send(host, "/v1/jobs", each).json()["id"] for each in bodies]
    of = lambda job: host.get(f"/v1/jobs/{job}").json()  # noqa: E731
    wait_until(
        lambda: [of(job)["state"] for job in jobs] == ["done", "running", "running"],
        within_s=60,
        what="two run at once",
    )
    apply(host, configuration("sd1"))
    assert [(of(job)["state"], of(job)["ranks"]) for job in jobs[1:]] == [("done", 1)] * 2
    assert np.abs(drawn(host)[0] - alone["sd1"][0]).max() <= 1
    assert host.get("/v1/models").json()["data"][0]["id"] == "sd1" and host.ranks() == ranks


def test_files_that_do_not_fit_leave_the_host_as_it_was(host, alone, tmp_path):
    apply(host, configuration("sd1"))
    before = host.get("/applied").text
    answer = send(
        host,
        "/apply",
        {**configuration("sdxl"), "checkpoint": {"checkpoint": str(checkpoint("sd1"))}},
    )
    assert (
        "is a StableDiffusionPipeline, but --type=sdxl needs a StableDiffusionXLPipeline"
        in assert_is_error(answer.json())
    )
    assert host.get("/applied").text == before


def test_weights_that_cannot_be_loaded_leave_the_host_empty_and_usable(host, alone, tmp_path):
    broken = without_a_weight(checkpoint("sdxl"), tmp_path / "broken")
    answer = send(
        host, "/apply", {**configuration("sdxl"), "checkpoint": {"checkpoint": str(broken)}}
    )
    assert answer.status_code == 500 and "unet" in assert_is_error(answer.json())
    assert host.get("/applied").text == "None"
    refused = host.post(GENERATE)
    assert refused.status_code == 503 and "unet" in assert_is_error(refused.json())
    apply(host, configuration("sd1"))
    assert np.abs(drawn(host)[0] - alone["sd1"][0]).max() <= 1


def test_empty_configuration_unloads(host):
    apply(host, {})
    assert host.get("/applied").text == "None" and host.get("/healthz").json()["phase"] == "empty"
    assert "no pipeline is loaded" in assert_is_error(host.post(GENERATE).json())


@pytest.mark.parametrize("path", ["/close", "/offload", "/applied"])
@pytest.mark.parametrize("header", ["Origin", "Referer", "Sec-Fetch-Site"])
def test_browsers_cannot_change_the_host(host, path, header):
    own = host.url("").rstrip("/") if header == "Origin" else "same-origin"
    answer = send(host, path, get=True, headers={header: own})
    assert answer.status_code == 400 and f"has the header {header}" in assert_is_error(
        answer.json()
    )
    assert send(host, path, get=True, headers={"Origin": "http://evil.example"}).status_code == 403
    assert send(host, path, get=True, headers={"Host": "evil.example"}).status_code == 400


def test_close_ends_the_host_and_frees_the_port(host):
    family = host.tree()
    assert send(host, "/close", get=True).status_code == 200
    wait_until(lambda: host.process.poll() is not None, within_s=10, what="the host has ended")
    host.session.close()
    assert host.process.returncode == 0, host.log
    wait_until(
        lambda: not any(process.is_running() for process in family),
        within_s=3,
        what="all ranks are gone",
    )
    assert_port_is_free(host.port)


@pytest.mark.slow
def test_single_host_is_one_process_of_the_same_kind():
    port = free_port()
    with _started(
        [
            sys.executable,
            str(CLIENT_FOLDER / "host_single.py"),
            f"--port={port}",
            "--height=64",
            "--width=64",
        ],
        port,
        None,
    ) as host:
        host.wait_until_ready()
        apply(host, {**configuration("sd1"), "backend_config": {"device_id": 0}})
        assert drawn(host)[0].shape == (64, 64, 3)
        answer = send(host, "/sleep", {"sleep": True, "time": 1})
        assert (
            answer.status_code == 500
            and "sleep is not available with one rank" in assert_is_error(answer.json())
        )
        assert send(host, "/close").status_code == 200
        wait_until(lambda: host.process.poll() is not None, within_s=10, what="the host has ended")
