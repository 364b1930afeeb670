"""Who is served and how much one client may ask for, over Flask's client
(tests/hosts/application.py).
"""

import pytest
from PIL import Image
from werkzeug.test import EnvironBuilder, run_wsgi_app

from backends.model_table import read_table
from hosts.compat.protocol import FixedModel
from hosts.http.app import Host, create_app
from hosts.launch.settings import Settings
from hosts.supervision.host_state import Phase
from tests.hosts.application import answer_jobs, encode_file, make_client
from tests.hosts.client import assert_is_error


def test_body_that_is_too_large_is_answered_as_an_error(client, queue, state):
    assert client.application.config["MAX_CONTENT_LENGTH"] >= 256 * 2**20
    client = make_client(queue, state, max_body_mb=1)
    answer = client.post("/generate", json={"positive": "a" * 1_000_001})
    assert answer.status_code == 413
    assert "(--max_body_mb)" in assert_is_error(answer.get_json())


@pytest.mark.parametrize(
    ("body", "limit", "said"),
    [
        ({"num_inference_steps": 31}, "max_steps", ("num_inference_steps=31 is more than this host "
                                                    "allows: 30 (--max_steps). Ask for less.")),
        ({"sigmas": [float(n) for n in range(31, -1, -1)]}, "max_steps", ("num_inference_steps=31 "
                                                                         "is more than this host "
                                                                         "allows: 30")),
        ({"timesteps": list(range(31, 0, -1))}, "max_steps", ("num_inference_steps=31 is more than "
                                                             "this host allows: 30 (--max_steps)")),
        ({"width": 32}, "max_side", "width=32 is more than this host allows: 24 (--max_side)"),
        ({"height": 32}, "max_side", "height=32 is more than this host allows: 24 (--max_side)"),
        ({"num_frames": 31}, "max_frames", ("num_frames=31 is more than this host allows: 30 "
                                       "(--max_frames)")),
        ({"prompt": "a" * 31}, "max_prompt_chars", ("prompt has 31 characters, more than this "
                                                     "host allows: 30 (--max_prompt_chars)")),
        ({"negative_prompt": "a" * 31}, "max_prompt_chars", ("negative_prompt has 31 characters, "
                                                             "more than this host allows: 30")),
    ],
)  # fmt: skip
def test_request_beyond_a_limit_of_the_operator_is_refused_and_one_within_is_not(
    body, limit, said, queue, state
):
    client = make_client(queue, state, type="ad", **{limit: 24 if limit == "max_side" else 30})
    body = {"prompt": "a cat", **body}
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 400 and said in assert_is_error(answer.get_json())
    smaller = {
        name: value - 8 if isinstance(value, int) else value[1:] for name, value in body.items()
    }
    assert client.post("/v1/jobs", json=smaller).status_code == 202
    assert make_client(queue, state, type="ad").post("/v1/jobs", json=body).status_code == 202


def test_images_are_limited_in_size_and_number(queue, state):
    client = make_client(queue, state, max_image_megapixels=1, control_net="x")
    bomb = encode_file(Image.new("RGB", (1001, 1000)))
    assert len(bomb) < 5000
    for name in ("init_image", "control_image"):
        answer = client.post("/generate", json={"positive": "a", name: bomb})
        assert (
            answer.status_code == 400
            and "the image of 1001x1000 has more than 1000000 pixels"
            in assert_is_error(answer.get_json())
        )
    small = encode_file(Image.new("RGB", (200, 100)))
    grown = client.post(
        "/generate", json={"positive": "a", "init_image": small, "init_image_scale": 1000}
    )
    assert grown.status_code == 400
    assert (
        "gives an image of 2000x1000, more than 1000000 pixels (--max_image_megapixels)"
        in assert_is_error(grown.get_json())
    )
    many = client.post("/generate", json={"positive": "a", "control_image": [small] * 17})
    assert (
        many.status_code == 400
        and "control_image holds 17 images. Allowed: 1 to 16." in assert_is_error(many.get_json())
    )
    none = client.post("/generate", json={"positive": "a", "init_image": []})
    assert (
        none.status_code == 400
        and "init_image holds 0 images. Allowed: 1 to 16." in assert_is_error(none.get_json())
    )


def test_number_of_images_of_one_request_is_limited(queue, state):
    client = make_client(queue, state, max_images=2)
    openai = client.post("/v1/images/generations", json={"prompt": "a", "n": 3})
    assert (
        openai.status_code == 400
        and "n=3 is not allowed. Allowed: 1 to 2." in openai.get_json()["error"]["message"]
    )
    a1111 = client.post("/sdapi/v1/txt2img", json={"prompt": "a", "n_iter": 3})
    assert (
        a1111.status_code == 400
        and "n_iter x batch_size is 3. Allowed: up to 2." in a1111.get_json()["detail"]
    )


def test_client_that_sends_too_much_is_told_when_to_come_back(queue, state):
    client = make_client(queue, state, rate_limit=2, api_key="a-key-of-sixteen")
    key = {"Authorization": "Bearer a-key-of-sixteen"}
    assert [
        client.post("/v1/jobs", json={"prompt": "a"}, headers=key).status_code for _ in range(3)
    ] == [202, 202, 429]
    refused = client.post("/v1/jobs", json={"prompt": "a"}, headers=key)
    assert (
        "more than 2 requests in a minute from one client (--rate_limit). Try again in 30 s."
        in assert_is_error(refused.get_json())
    )
    assert refused.headers["Retry-After"] == "30"
    assert client.get("/v1/jobs", headers=key).status_code == 200


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", "[::1]", "localhost:6000", "[::1]:6000", "LOCALHOST"]
)
def test_own_names_are_served(name, client):
    assert client.get("/initialize", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.7",
        "evil.example:6000",
        "localhost.evil.example",
    ],
)
def test_names_of_others_are_refused(name, client):
    """A page of another site may resolve its own name to this machine."""
    answer = client.get("/initialize", headers={"Host": name})
    assert answer.status_code == 400
    assert "is not served here. Allowed: " in assert_is_error(answer.get_json())


def test_address_given_at_launch_is_served_and_a_wildcard_allows_all(queue, state):
    assert (
        make_client(queue, state, host="10.0.0.7")
        .get("/initialize", headers={"Host": "10.0.0.7:6000"})
        .status_code
        == 200
    )
    assert (
        make_client(queue, state, host="10.0.0.7")
        .get("/initialize", headers={"Host": "10.0.0.8"})
        .status_code
        == 400
    )
    assert (
        make_client(queue, state, host="0.0.0.0")
        .get("/initialize", headers={"Host": "any.example"})
        .status_code
        == 200
    )


KEY = "0123456789abcdef-secret"


@pytest.fixture
def guarded(queue, state):
    settings = Settings.from_values({"api_key": KEY, "host": "0.0.0.0"})
    return create_app(
        Host(
            settings=settings,
            spec=read_table()["sdxl"],
            queue=queue,
            state=state,
            protocol=FixedModel(),
        )
    ).test_client()


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer "]
)
def test_request_without_the_key_is_refused_and_not_queued(header, guarded, queue):
    answer = guarded.post(
        "/generate", json={"positive": "a"}, headers={"Authorization": header} if header else {}
    )
    assert answer.status_code == 401 and "needs its key" in assert_is_error(answer.get_json())
    assert queue.num_waiting == 0
    for path in (
        "/settings",
        "/metrics",
        "/v1/jobs",
        "/initialize",
        "/progress",
        "/openapi.json",
        "/v1/models",
    ):
        assert guarded.get(path).status_code == 401, path


def test_request_with_the_key_is_served_and_the_key_is_told_to_nobody(guarded, queue):
    answer_jobs(queue)
    bearer = {"Authorization": f"Bearer {KEY}"}
    assert guarded.post("/generate", json={"positive": "a"}, headers=bearer).status_code == 200
    assert KEY not in guarded.get("/settings", headers=bearer).get_data(as_text=True)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/page.css",
        "/page.js",
        "/form.js",
        "/mask.js",
        "/lora.js",
        "/png.js",
        "/healthz",
        "/livez",
    ],
)
def test_page_and_probes_need_no_key(path, guarded):
    assert guarded.get(path).status_code == 200


def test_host_that_waits_for_another_machine_keeps_jobs_and_refuses_what_would_wait(
    client, queue, state
):
    state.become(Phase.WAITING, "waiting for machine 1 of 2 to join 10.0.0.1:29500")
    assert (
        client.get("/readyz").get_data(as_text=True)
        == "waiting: waiting for machine 1 of 2 to join 10.0.0.1:29500"
    )
    assert (
        client.get("/initialize").status_code,
        client.get("/healthz").status_code,
        client.get("/livez").status_code,
    ) == (503, 503, 200)
    for path in ("/generate", "/v1/images/generations", "/sdapi/v1/txt2img"):
        answer = client.post(path, json={"prompt": "a"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10"), path
        assert (
            "the host is waiting for machine 1 of 2 to join 10.0.0.1:29500. Send the request "
            "again later" in answer.text
        )
    assert (
        client.post("/v1/jobs", json={"prompt": "a"}).status_code == 202 and queue.num_waiting == 1
    )


def test_probes_need_no_host(client):
    """HAProxy's default check is HTTP/1.0 without one; browsers always send one."""
    environ = EnvironBuilder(path="/healthz").get_environ()
    del environ["HTTP_HOST"]
    environ["SERVER_NAME"] = "diffusion"
    _, status, _ = run_wsgi_app(client.application, environ)
    assert status.startswith("200")


@pytest.mark.parametrize("host", ["localhost", "localhost.", "127.0.0.1:99", "[::1]:99"])
def test_names_of_this_host_are_served(client, host):
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "evil.example", "localhost.evil.example", "[", "[x"])
def test_other_names_are_refused_with_the_way_out(client, host):
    answer = client.get("/healthz", headers={"Host": host})
    assert answer.status_code == 400 and "--host" in answer.get_data(as_text=True)


@pytest.mark.parametrize("origin", ["http://[", "http://evil.example", "null", "//["])
def test_origins_that_are_none_are_foreign(client, origin):
    answer = client.post("/v1/jobs", json={"prompt": "a"}, headers={"Origin": origin})
    assert answer.status_code == 403


@pytest.mark.parametrize("key", [None, KEY])
def test_programs_in_a_browser_may_send_requests_once_their_origin_is_given(key, queue, state):
    origin = "http://localhost:5001"
    keyed = {"api_key": key} if key else {}
    client = make_client(queue, state, allowed_origins=f"{origin},https://chat.example", **keyed)
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os"}  # fmt: skip
    for path in ("/v1/jobs", "/sdapi/v1/txt2img", "/v1/images/generations"):
        asked = client.options(path, headers=ask)  # browsers send no key with it
        assert asked.status_code == 200
        assert asked.headers["Access-Control-Allow-Origin"] == origin
        assert asked.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
        assert "POST" in asked.headers["Access-Control-Allow-Methods"]
        foreign = client.options(path, headers={**ask, "Origin": "http://localhost:5002"})
        assert foreign.status_code == 403
        assert "Access-Control-Allow-Origin" not in foreign.headers
    sent = {"Origin": origin, **({"Authorization": f"Bearer {key}"} if key else {})}
    made = client.post("/v1/jobs", json={"prompt": "a"}, headers=sent)
    assert made.status_code == 202 and made.headers["Access-Control-Allow-Origin"] == origin
    assert "Origin" in made.headers["Vary"]
    wrong = client.post("/v1/jobs", json={"promt": "a"}, headers=sent)
    assert wrong.status_code == 400 and "Access-Control-Allow-Origin" in wrong.headers
    if key:
        assert client.post("/v1/jobs", json={"prompt": "a"}, headers=ask).status_code == 401
    assert "Access-Control-Allow-Origin" not in client.get("/healthz").headers


def test_unknown_paths_are_404_whatever_is_sent(client):
    for path in ("/nothing", "/v1/nothing", "/sdapi/v1/nothing"):
        assert client.post(path, data={"a": "b"}).status_code == 404
        assert client.post(path, data=b"x", content_type="text/plain").status_code == 404


@pytest.mark.parametrize("key", [None, KEY])
def test_client_is_not_another_one_by_how_it_spells_a_header(key, queue, state):
    client = make_client(queue, state, rate_limit=2, **({"api_key": key} if key else {}))
    spellings = [f"Bearer {KEY}", f"Bearer  {KEY}", f"bEaReR   {KEY} "]
    if key is None:
        spellings += ["Bearer other", "Digest x"]
    found = [
        client.post("/v1/jobs", json={"prompt": "a"}, headers={"Authorization": each}).status_code
        for each in spellings
    ]
    assert found == [202, 202, *(429,) * (len(spellings) - 2)]


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize(
    ("one", "other", "are_two"),
    [
        ("10.0.0.1", "10.0.0.2", True),
        ("2001:db8::1", "2001:db8::ffff:1", False),
        ("2001:db8::1", "2001:db8:0:1::1", True),
    ],
)
def test_clients_are_told_apart_by_their_addresses(key, one, other, are_two, queue, state):
    client = make_client(queue, state, rate_limit=1, **({"api_key": key} if key else {}))
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "1"}

    def ask(address, prompt):
        environ = {"REMOTE_ADDR": address}
        return client.post(
            "/v1/jobs", json={"prompt": prompt}, headers=headers, environ_overrides=environ
        ).status_code

    assert [ask(one, "a"), ask(other, "b")] == [202, 202 if are_two else 429]
