"""Several models on one host of two ranks (--models): each request gets the model that it names, in
every API, also after the ranks were restarted; a model that cannot be loaded fails its own jobs.

The tests use one host, in this order.
"""

import json

import numpy as np
import pytest

from tests.altered import without_a_weight
from tests.backends.features import TABLE, loaded
from tests.checkpoints import checkpoint
from tests.hosts.harness import READY_WITHIN_S, start_launcher, wait_until
from tests.hosts.sending import BODY, begun, from_file, over, pixels, send, show

MODELS = {"base": "sdxl", "old": "sd1"}
NAMES = ["base", "broken", "old"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, one that passes all checks of headers and cannot be loaded, and a file that is no
    model.
    """
    made = tmp_path_factory.mktemp("models")
    for name, kind in MODELS.items():
        (made / name).symlink_to(checkpoint(kind))
    without_a_weight(checkpoint("sdxl"), made / "broken")
    (made / "notes.safetensors").write_bytes(b"no weights at all")
    return made


@pytest.fixture(scope="module")
def host(folder):
    with start_launcher(
        f"--models={folder}",
        "--nproc_per_node=2",
        "--backend=distrifuser",
        "--sync_mode=full_sync",
        "--mode=latency",
        "--height=64",
        "--width=64",
        "--models_memory=1",
    ) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def alone():
    """Name of a model -> the image of BODY by one rank."""
    from backends.request import GenerateRequest

    found = {}
    for name, kind in MODELS.items():
        pipeline = loaded(TABLE[kind], height=64, width=64)
        found[name] = pipeline.generate(GenerateRequest(**BODY)).frames[0].astype(int)
    return found


def assert_is_of(image, name, alone):
    assert np.abs(image - alone[name]).max() <= 1, f"it is not by {name}"


def images_generation(host, **body):
    fields = {"response_format": "b64_json", "prompt": "x", **BODY, **body}
    return host.session.post(host.url("/v1/images/generations"), json=fields, timeout=120)


def txt2img(host, **body):
    fields = {
        "prompt": BODY["prompt"],
        "negative_prompt": BODY["negative_prompt"],
        "steps": BODY["num_inference_steps"],
        "cfg_scale": BODY["guidance_scale"],
        "seed": BODY["seed"],
        **body,
    }
    answer = host.session.post(host.url("/sdapi/v1/txt2img"), json=fields, timeout=120)
    assert answer.status_code == 200, answer.text
    return from_file(answer.json()["images"][0]), json.loads(answer.json()["info"])


def test_host_is_ready_before_any_model_is_loaded_and_lists_all(host):
    assert "model base is being loaded" not in host.log
    assert "notes.safetensors is left out" in host.log
    assert [each["id"] for each in host.get("/v1/models").json()["data"]] == NAMES
    assert host.get("/v1/models/old").json()["id"] == "old"
    titles = [each["title"] for each in host.get("/sdapi/v1/sd-models").json()]
    assert titles == NAMES
    form = host.get("/openapi.json?model=old").json()["components"]["schemas"]["Request"]
    assert form["properties"]["model"]["enum"] == [*NAMES, None]


def test_every_api_gets_the_model_that_it_names_and_else_the_first(host, alone):
    assert_is_of(pixels(host, over(host, send(host, BODY))[0]["id"]), "base", alone)
    (job,) = over(host, send(host, {**BODY, "model": "old"}))
    assert (job["model"], job["type"]) == ("old", "sd1")
    assert_is_of(pixels(host, job["id"]), "old", alone)
    image, info = txt2img(host, override_settings={"sd_model_checkpoint": "base"})
    assert_is_of(image, "base", alone)
    assert info["sd_model_name"] == "base"
    answer = images_generation(host, model="old").json()
    assert_is_of(from_file(answer["data"][0]["b64_json"]), "old", alone)
    file = host.post({**BODY, "model": "base"}, headers={"Accept": "image/png"})
    assert_is_of(from_file(file.content), "base", alone)
    assert host.get("/settings").json()["model"] == "base"


def test_a_folder_may_hold_one_model(tmp_path, alone):
    (tmp_path / "base").symlink_to(checkpoint("sdxl"))
    with start_launcher(
        f"--models={tmp_path}", "--nproc_per_node=1", "--height=64", "--width=64"
    ) as host:
        host.wait_until_ready()
        for named in ({}, {"model": "base"}):
            (job,) = over(host, send(host, {**BODY, **named}))
            assert_is_of(pixels(host, job["id"]), "base", alone)
        assert_is_of(
            from_file(images_generation(host).json()["data"][0]["b64_json"]), "base", alone
        )


def test_a_model_that_was_used_before_is_not_read_again(host):
    before = host.log.count("is taken from main memory")
    over(host, send(host, {**BODY, "model": "old"}), send(host, {**BODY, "model": "base"}))
    assert host.log.count("is taken from main memory") >= before + 2
    assert "to free main memory" not in host.log


def test_a_model_that_does_not_exist_is_refused_with_those_that_do(host):
    for path, fields in {
        "/v1/jobs": {"prompt": "x", "model": "other"},
        "/generate": {"prompt": "x", "model": "other"},
        "/v1/images/generations": {"prompt": "x", "model": "other"},
        "/sdapi/v1/txt2img": {
            "prompt": "x",
            "override_settings": {"sd_model_checkpoint": "other"},
        },
        "/sdapi/v1/options": {"sd_model_checkpoint": "other"},
    }.items():
        answer = host.session.post(host.url(path), json=fields, timeout=20)
        assert answer.status_code == 404
        assert "there is no model 'other'. Allowed: base, broken, old." in answer.text


def test_an_error_while_loading_reaches_the_job_that_asked_and_no_other(host, alone):
    blocker = begun(host, {**BODY, "num_inference_steps": 30})
    broken, good = (send(host, {**BODY, "model": name}) for name in ("broken", "old"))
    _, failed, done = over(host, blocker, broken, good)
    assert failed["state"] == "failed"
    assert "broken (unet) does not fit: 1 tensor is missing" in failed["error"]
    assert done["state"] == "done"
    assert_is_of(pixels(host, good), "old", alone)
    assert host.get("/readyz").status_code == 200
    answer = images_generation(host, model="broken")
    assert answer.status_code >= 400
    assert answer.json()["error"]["message"] == failed["error"]


def test_the_model_chosen_in_a1111s_options_stays_chosen_when_the_ranks_restart(host, alone):
    """And a job that waits for another model gets that one."""
    answer = host.session.post(
        host.url("/sdapi/v1/options"), json={"sd_model_checkpoint": "old"}, timeout=20
    )
    assert answer.status_code == 200
    assert host.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "old"
    old = host.ranks()
    running = begun(host, {**BODY, "num_inference_steps": 40})
    waiting = send(host, {**BODY, "model": "old"})
    wait_until(lambda: show(host, running)["step"] > 3, within_s=60, what="the job runs")
    old[1].kill()
    wait_until(
        lambda: not any(process.is_running() for process in old.values()),
        within_s=20,
        what="the old ranks are gone",
    )
    wait_until(
        lambda: host.status() == 200, within_s=READY_WITHIN_S, what="ready again", every_s=0.2
    )
    first, second = over(host, running, waiting)
    assert (first["state"], first["model"]) == ("done", "base")
    assert (second["state"], second["model"]) == ("done", "old")
    assert_is_of(pixels(host, waiting), "old", alone)
    image, info = txt2img(host)
    assert info["sd_model_name"] == "old"
    assert_is_of(image, "old", alone)
