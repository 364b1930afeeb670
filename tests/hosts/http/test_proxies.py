"""A host behind proxies: names, addresses, prefixes, keys as Basic passwords, signed links."""

import base64
import re
import time
from urllib.parse import urlsplit

import pytest

from backends.errors import ConfigError
from hosts.http import access
from hosts.launch.settings import Settings
from hosts.launch.start_plan import LOOPBACK_NAMES
from tests.hosts.application import answer_jobs, make_client
from tests.hosts.client import assert_is_error

KEY = "0123456789abcdef-secret"
PUBLIC = "https://draw.example/gpu"
FROM_PROXY = {"REMOTE_ADDR": "10.1.2.3"}


def basic(user, key):
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


def location(client, *, environ=None, **headers):
    answer = client.post(
        "/v1/images/generations",
        json={"prompt": "a"},
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        environ_overrides=environ or {},
    )
    assert answer.status_code == 200, answer.text
    return answer.get_json()["data"][0]["url"]


def test_names_of_proxies_are_served_once_they_are_given(queue, state):
    known = make_client(queue, state, allowed_hosts="draw.example,10.0.0.7", public_url=PUBLIC)
    for name in (*LOOPBACK_NAMES - {"::1"}, "draw.example", "DRAW.example:8443", "10.0.0.7"):
        assert known.get("/healthz", headers={"Host": name}).status_code == 200, name
    refused = known.get("/healthz", headers={"Host": "evil.example"})
    assert refused.status_code == 400
    assert "--allowed_hosts" in assert_is_error(refused.get_json())


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://draw.example", 202),
        ("https://draw.example:8443", 403),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_page_of_the_public_address_is_our_own_whatever_host_the_proxy_sends(
    origin, status, queue, state
):
    client = make_client(queue, state, public_url=PUBLIC)
    answer = client.post("/v1/jobs", json={"prompt": "a"}, headers={"Origin": origin})
    assert answer.status_code == status
    if status == 403:
        assert "--public_url" in assert_is_error(answer.get_json())


@pytest.mark.parametrize("path", ["/gpu/v1/jobs", "/v1/jobs"])
def test_prefix_of_the_public_address_may_be_sent_on_or_not(path, queue, state):
    client = make_client(queue, state, public_url=PUBLIC)
    answer = client.post(path, json={"prompt": "a"})
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/gpu/v1/jobs/{answer.get_json()['id']}"
    assert client.get("/gpu", headers={"Accept": "text/html"}).status_code == 200


def test_links_have_the_public_address(queue, state):
    answer_jobs(queue)
    assert location(make_client(queue, state, public_url=f"{PUBLIC}/")).startswith(
        f"{PUBLIC}/v1/jobs/"
    )
    plain = location(make_client(queue, state))
    assert plain.startswith("http://localhost/v1/jobs/")


@pytest.mark.parametrize(
    ("trusted", "sender", "url"),
    [
        ("10.0.0.0/8", "10.1.2.3", "https://draw.example/gpu/v1/jobs/"),
        ("127.0.0.1", "10.1.2.3", "http://localhost/v1/jobs/"),
        ("10.0.0.0/8", "11.1.2.3", "http://localhost/v1/jobs/"),
        (None, "127.0.0.1", "http://localhost/v1/jobs/"),
    ],
)
def test_headers_of_proxies_count_only_from_trusted_addresses(
    trusted, sender, url, queue, state, caplog
):
    answer_jobs(queue)
    client = make_client(queue, state, allowed_hosts="draw.example", trusted_proxies=trusted)
    found = location(
        client,
        environ={"REMOTE_ADDR": sender},
        X_Forwarded_Host="evil.example, draw.example",
        X_Forwarded_Proto="http, https",
        X_Forwarded_Prefix="/gpu/",
    )
    assert found.startswith(url)
    assert (f"--trusted_proxies={sender}" in caplog.text) is (url[:5] != "https")


def test_name_that_a_trusted_proxy_passes_on_is_checked_too(queue, state):
    client = make_client(queue, state, trusted_proxies="10.0.0.0/8")
    answer = client.get(
        "/healthz", headers={"X-Forwarded-Host": "evil.example"}, environ_overrides=FROM_PROXY
    )
    assert answer.status_code == 400 and "evil.example" in answer.text


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        ("1.1.1.1", "1.1.1.1"),
        ("9.9.9.9, 1.1.1.1", "1.1.1.1"),
        ("9.9.9.9, 1.1.1.1, 10.9.9.9", "1.1.1.1"),
        ("unknown", "unknown"),
    ],
)
def test_rate_is_of_the_client_that_the_proxies_saw(chain, client, queue, state):
    """What a client itself wrote before the address that the proxy appended does not count."""
    host = make_client(queue, state, trusted_proxies="10.0.0.0/8", rate_limit=1)

    def ask(forwarded_for):
        return host.post(
            "/v1/jobs",
            json={"prompt": "a"},
            headers={"X-Forwarded-For": forwarded_for},
            environ_overrides=FROM_PROXY,
        ).status_code

    assert [ask(chain), ask(f"3.3.3.3, {client}"), ask("2.2.2.2")] == [202, 429, 202]


@pytest.mark.parametrize("user", ["", "anybody", "me"])
def test_key_may_be_the_password_of_basic_authentication(user, queue, state):
    client = make_client(queue, state, api_key=KEY, host="0.0.0.0", rate_limit=2)
    assert client.get("/sdapi/v1/options", headers=basic(user, KEY)).status_code == 200
    for wrong in (basic(KEY, ""), basic(user, "x" + KEY), {"Authorization": "Basic ?"}):
        assert client.get("/sdapi/v1/options", headers=wrong).status_code == 401


def test_one_key_is_one_client_however_it_is_sent(queue, state):
    client = make_client(queue, state, api_key=KEY, rate_limit=2)
    headers = [basic("a", KEY), {"Authorization": f"Bearer {KEY}"}, basic("b", KEY)]
    assert [
        client.post("/v1/jobs", json={"prompt": "a"}, headers=each).status_code for each in headers
    ] == [202, 202, 429]


def test_programs_are_offered_basic_and_scripts_of_the_page_are_not(queue, state):
    client = make_client(queue, state, api_key=KEY)
    offered = client.get("/v1/jobs").headers.getlist("WWW-Authenticate")
    assert offered == ["Bearer", 'Basic realm="diffusion-launcher", charset="UTF-8"']
    script = client.get("/v1/jobs", headers={"Sec-Fetch-Mode": "cors"})
    assert script.headers.getlist("WWW-Authenticate") == ["Bearer"]


@pytest.fixture
def signed(queue, state):
    """A client of a host with a key, and the link to a finished image, without scheme and name."""
    answer_jobs(queue)
    client = make_client(queue, state, api_key=KEY)
    url = urlsplit(location(client, Authorization=f"Bearer {KEY}"))
    return client, f"{url.path}?{url.query}"


def test_link_to_an_image_needs_no_key(signed):
    client, link = signed
    answer = client.get(link)
    assert answer.status_code == 200 and answer.data[:4] == b"\x89PNG"
    assert KEY not in link


def test_link_is_for_one_image_and_for_reading(signed):
    client, link = signed
    job = urlsplit(link).path.split("/")[3]
    for changed in (
        link.replace("format=png", "format=jpg"),
        link.replace(job, "other"),
        link.replace("/result?", "/trace?"),
        link.replace("/result?", "?"),
        re.sub(r"expires=\d+", f"expires={int(time.time()) + 10**6}", link),
        re.sub(r"signature=\w+", "signature=", link),
        re.sub(r"signature=\w+", "signature=%C3%A9", link),
        re.sub(r"&?signature=\w+", "", link),
    ):
        assert client.get(changed).status_code == 401, changed
    assert client.delete(link).status_code == 401


def test_link_expires(signed, monkeypatch):
    client, link = signed
    later = time.time() + access.LINK_S
    monkeypatch.setattr(access.time, "time", lambda: later - 5)
    assert client.get(link).status_code == 200
    monkeypatch.setattr(access.time, "time", lambda: later + 5)
    refused = client.get(link)
    assert refused.status_code == 401 and "has expired" in assert_is_error(refused.get_json())
    assert client.get(link, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_link_gives_the_format_and_compression_that_were_asked_for(queue, state):
    answer_jobs(queue)
    client = make_client(queue, state)
    body = {"prompt": "a", "output_format": "webp", "output_compression": 5}
    url = client.post("/v1/images/generations", json=body).get_json()["data"][0]["url"]
    answer = client.get(url)
    assert (answer.mimetype, answer.data[8:12]) == ("image/webp", b"WEBP")
    plain = client.get(url.replace("quality=5", "quality=100"))
    assert plain.data != answer.data
    job = urlsplit(url).path
    assert client.get(f"{job}?format=exe").status_code == 400
    assert client.get(f"{job}?format=jpg&quality=101").status_code == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("public_url", "draw.example"),
        ("public_url", "ftp://draw.example"),
        ("public_url", "https://me:pass@draw.example"),
        ("public_url", "https://draw.example/?a=b"),
        ("public_url", "https://draw.example:99999"),
        ("public_url", "https://draw.example/a b"),
        ("allowed_hosts", "draw.example:8443"),
        ("allowed_hosts", "*.example"),
        ("allowed_hosts", " , "),
        ("allowed_origins", "localhost:5001"),
        ("allowed_origins", "*"),
        ("allowed_origins", "null"),
        ("allowed_origins", "https://chat.example/path"),
        ("trusted_proxies", "proxy.example"),
        ("trusted_proxies", "10.0.0.1/8"),
    ],
)
def test_addresses_that_are_none_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^--{name}="):
        Settings.from_values({name: value})


def test_addresses_may_be_lists_of_a_file():
    settings = Settings.from_values(
        {"allowed_hosts": ["A.example", "::1"], "trusted_proxies": ["10.0.0.0/8", "::1"]}
    )
    assert settings.allowed_hosts == ("a.example", "::1")
    assert settings.trusted_proxies == ("10.0.0.0/8", "::1")
