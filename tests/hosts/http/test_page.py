"""The page in a real browser against a real host of two ranks: type, click, watch the preview,
cancel, see the image.
"""

import io
import json
import re
import shutil

import numpy as np
import pytest
import requests
from PIL import Image

from tests.hosts.harness import start_launcher

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
WAIT_S = 60
EXPECTED = ("v1/jobs", "net::ERR_")


@pytest.fixture(scope="module")
def host():
    with start_launcher("--type=sdxl", "--backend=distrifuser", "--nproc_per_node=2") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(host, browser):
    """The page, loaded anew, with its form built."""
    size(browser, 1200, 1000)
    scheme(browser, "light")
    browser.get(host.url("/"))
    until(browser, lambda: find(browser, "#field-prompt"))
    return browser


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


def find(browser, selector):
    found = browser.find_elements("css selector", selector)
    return found[0] if found else None


def texts(browser, selector):
    """The texts of all that match, read in one go: the page draws its tables anew several times a
    second.
    """
    rows = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(row => row.innerText)", selector
    )
    return [re.sub(r"\s+", " ", row).strip() for row in rows]


def until(browser, condition, within_s=WAIT_S):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, within_s, poll_frequency=0.05).until(lambda _: condition())


def size(browser, width, height):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def scheme(browser, value):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": value}]},
    )


def fill(browser, name, value):
    field = find(browser, f"#field-{name}")
    browser.execute_script("arguments[0].value = arguments[1]", field, str(value))


def caption(browser):
    return texts(browser, "#caption")[0]


def source(browser):
    """Address of the image on show, or None; asked in one go, for a preview may be replaced between
    two questions.
    """
    return browser.execute_script("return document.querySelector('#canvas img')?.src")


def test_image_is_typed_drawn_previewed_and_kept_with_its_settings(page, host, screenshots):
    assert find(page, "#field-num_inference_steps").get_attribute("value") == "20"
    assert page.switch_to.active_element.get_attribute("id") == "field-prompt"
    page.switch_to.active_element.send_keys("a large red circle on a blue background")
    fill(page, "num_inference_steps", 30)
    fill(page, "seed", 1)
    find(page, "#draw").click()
    first = until(page, lambda: source(page))
    assert first.startswith("data:image/jpeg;base64,")
    page.save_screenshot(screenshots / "generating.png")
    until(page, lambda: source(page) != first and source(page).startswith("data:"))
    until(page, lambda: source(page).startswith("blob:"))
    assert "128x128, 30 steps, guidance 2.5, EulerDiscreteScheduler, seed 1" in caption(page)
    assert find(page, "#cancel").get_attribute("hidden") and not find(
        page, "#download"
    ).get_attribute("hidden")
    name = find(page, "#download").get_attribute("download")
    png = requests.get(host.url(f"/v1/jobs/{name.removesuffix('.png')}/result"), timeout=20).content
    sample_image = Image.open(io.BytesIO(png))
    centre, corner = (
        np.asarray(sample_image)[64, 64].astype(int),
        np.asarray(sample_image)[4, 4].astype(int),
    )
    assert (
        centre[0] > 150
        and centre[0] > 2 * centre[2]
        and corner[2] > 120
        and corner[2] > 2 * corner[0]
    )
    assert (
        json.loads(sample_image.text["parameters"])["prompt"]
        == "a large red circle on a blue background"
    )
    until(page, lambda: len(texts(page, "#gallery li")) == 1)
    until(page, lambda: len(texts(page, "#ranks tr")) == 2)
    for number, row in enumerate(
        texts(page, "#ranks tr")
    ):  # device, memory, share of computing and of waiting
        assert re.match(rf"{number} cpu \d+ MB \d+ % \d+ %", row), row
    size(page, 1200, 1320)
    page.save_screenshot(screenshots / "light.png")
    scheme(page, "dark")
    page.save_screenshot(screenshots / "dark.png")
    size(page, 390, 1400)
    assert page.execute_script("return document.documentElement.scrollWidth <= 390")
    page.save_screenshot(screenshots / "phone.png")


def test_long_job_is_cancelled_by_its_button_and_the_next_one_runs(page):
    fill(page, "prompt", "a yellow star")
    fill(page, "num_inference_steps", 900)
    find(page, "#draw").click()
    until(page, lambda: "step" in caption(page))
    assert "yours" in until(
        page, lambda: (text := find(page, "#queue").text) and "yours" in text and text
    )
    find(page, "#cancel").click()
    until(page, lambda: caption(page).startswith("cancelled: "))
    fill(page, "num_inference_steps", 2)
    find(page, "#draw").click()
    until(page, lambda: "2 steps" in caption(page))


def test_job_is_shown_also_if_its_rank_dies_meanwhile(page, host):
    """The events break off; the host restarts its ranks and goes on with the job."""
    fill(page, "prompt", "a yellow star")
    fill(page, "num_inference_steps", 300)
    fill(page, "seed", 7)
    find(page, "#draw").click()
    until(page, lambda: re.match(r"step [1-9]", caption(page)))
    host.ranks()[0].kill()
    until(page, lambda: "300 steps" in caption(page) and source(page).startswith("blob:"), 180)
    assert "seed 7" in caption(page) and find(page, "#error").get_attribute("hidden")


def test_error_of_the_host_is_read_out_and_the_form_stays(page, screenshots):
    page.execute_script("document.getElementById('form').noValidate = true")
    fill(page, "prompt", "a yellow star")
    fill(page, "num_inference_steps", 0)
    find(page, "#draw").click()
    until(page, lambda: "steps=0 is not allowed" in find(page, "#error").text)
    assert find(page, "#error").get_attribute("role") == "alert"
    assert find(page, "#field-prompt").get_attribute("value") == "a yellow star"
    page.save_screenshot(screenshots / "error.png")


def test_keyboard_alone_is_enough(page):
    from selenium.webdriver.common.keys import Keys

    page.switch_to.active_element.send_keys("a green heart")
    fill(page, "num_inference_steps", 2)
    page.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    until(page, lambda: "2 steps" in caption(page))


def test_schema_is_read_as_a_page_that_the_page_links_to(page, host, screenshots):
    page.find_element("link text", "API").click()
    until(page, lambda: find(page, "#Request tbody tr"))
    document = requests.get(host.url("/openapi.json"), timeout=10).json()
    calls = [call.text for call in page.find_elements("css selector", "#calls summary code")]
    assert calls == [
        f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method in methods
    ]
    fields = {row.split(" ")[0]: row for row in find(page, "#Request tbody").text.splitlines()}
    assert set(document["components"]["schemas"]["Request"]["properties"]) <= set(fields)
    assert (
        fields["num_inference_steps"]
        == "num_inference_steps integer from 1 to 1000 20 Sampling steps."
    )
    assert "euler_a" in fields["scheduler"]
    find(page, "#calls details[id='post/v1/jobs'] summary").click()
    assert f"curl -s {host.url('/v1/jobs')}" in find(page, "#calls details[open] pre").text
    page.save_screenshot(screenshots / "docs.png")
    size(page, 390, 1400)
    assert page.execute_script("return document.documentElement.scrollWidth <= 390")
    page.save_screenshot(screenshots / "docs-phone.png")


def test_page_asks_nobody_else_and_logs_no_error(page, host):
    asked = page.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert asked and all(name.startswith(host.url("/")) for name in asked)
    # the browser also logs the refusal and the restart of the tests before
    messages = [
        entry
        for entry in page.get_log("browser")
        if entry["level"] == "SEVERE" and not any(word in entry["message"] for word in EXPECTED)
    ]
    assert not messages
    policy = requests.get(host.url("/"), timeout=10).headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'")
