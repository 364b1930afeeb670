"""The page in a real browser against a real host of two ranks: type, click, watch the preview,
cancel, see the image.
"""

import contextlib
import io
import json
import re
import threading

import numpy as np
import pytest
import requests
from PIL import Image
from werkzeug.serving import make_server

from tests.hosts.dialects.reading import ReadingHost
from tests.hosts.harness import start_launcher
from tests.hosts.http.browser import (
    browser,  # noqa: F401  a fixture
    caption,
    fill,
    find,
    generate_long,
    give_file,
    is_directly_below,
    is_in_view,
    is_shown,
    pytestmark,  # noqa: F401  needs a browser
    reload,
    scheme,
    size,
    source,
    texts,
    until,
    value,
)

EXPECTED = ("v1/jobs", "net::ERR_")


@pytest.fixture(scope="module")
def host():
    with start_launcher("--type=sdxl", "--backend=distrifuser", "--nproc_per_node=2") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def page(host, browser):  # noqa: F811
    """The page, loaded anew, with its form built."""
    size(browser, 1200, 1000)
    scheme(browser, "light")
    browser.get(host.url("/"))
    until(browser, lambda: find(browser, "#field-prompt"))
    return browser


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


def test_image_is_generated_from_a_typed_prompt_previewed_and_kept_with_its_settings(
    page, host, screenshots
):
    assert find(page, "#field-num_inference_steps").get_attribute("value") == "20"
    assert page.switch_to.active_element.get_attribute("id") == "field-prompt"
    page.switch_to.active_element.send_keys("a large red circle on a blue background")
    fill(page, "num_inference_steps", 30)
    fill(page, "seed", 1)
    find(page, "#generate").click()
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
    assert texts(page, "#gallery li") == ["a large red circle on a blue background seed 1"]
    find(page, "#operator summary").click()
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


def test_second_job_queues_behind_the_one_on_show_and_both_are_cancelled(page, host):
    generate_long(page, "a yellow star")
    until(page, lambda: caption(page).startswith("Step "))
    until(page, lambda: re.match(r"\d+ % · ", page.title))
    generate_long(page, "a grey square " + "beside another one " * 10)
    foreign = requests.post(host.url("/v1/jobs"), json={"prompt": "a secret"}, timeout=20).json()
    lines = until(page, lambda: len(found := texts(page, "#queue li")) == 3 and found)
    assert "a yellow star" in lines[0] and lines[1].startswith("Waiting: 1 job ahead a grey square")
    assert lines[2] == "Waiting: 2 jobs ahead another client's job"
    assert caption(page).startswith("Step "), "the running job left the stage"
    assert is_shown(page, "#cancel")
    size(page, 390, 844)
    assert page.execute_script("return document.documentElement.scrollWidth <= 390")
    find(page, "#queue li:nth-child(2) button").click()
    until(page, lambda: len(texts(page, "#queue li")) == 2)
    assert caption(page).startswith("Step ")
    find(page, "#cancel").click()
    until(page, lambda: caption(page) == "Cancelled")
    until(page, lambda: is_shown(page, "#queue-empty"))
    assert texts(page, "#queue-empty") == ["Queue is empty"] and " % " not in page.title
    assert requests.get(host.url(foreign["links"]["self"]), timeout=20).json()["state"] == "done"


def test_job_behind_the_one_on_show_takes_the_stage_when_its_turn_comes(page):
    generate_long(page, "a yellow star")
    until(page, lambda: caption(page).startswith("Step "))
    fill(page, "num_inference_steps", 2)
    find(page, "#generate").click()
    until(page, lambda: len(texts(page, "#queue li")) == 2)
    find(page, "#queue li button").click()
    until(page, lambda: "2 steps" in caption(page))


def test_empty_prompt_is_said_below_generate_before_anything_is_sent(page, host):
    before = requests.get(host.url("/v1/jobs"), timeout=20).json()["jobs"]
    size(page, 390, 500)
    page.execute_script("document.getElementById('more').open = true")
    page.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    page.execute_script("document.getElementById('form').requestSubmit()")
    assert find(page, "#error").text == "The prompt is empty. Describe the image that you want."
    assert is_in_view(page, "#error") and is_directly_below(page, "#error", "#generate")
    assert page.switch_to.active_element.get_attribute("id") == "field-prompt"
    assert requests.get(host.url("/v1/jobs"), timeout=20).json()["jobs"] == before


@pytest.mark.slow  # test_page_whole kills another rank
def test_job_is_shown_also_if_its_rank_dies_meanwhile(page, host):
    """The events break off; the host restarts its ranks and goes on with the job."""
    fill(page, "prompt", "a yellow star")
    fill(page, "num_inference_steps", 300)
    fill(page, "seed", 7)
    find(page, "#generate").click()
    until(page, lambda: re.match(r"Step [1-9]", caption(page)))
    host.ranks()[0].kill()
    until(page, lambda: "300 steps" in caption(page) and source(page).startswith("blob:"), 180)
    assert "seed 7" in caption(page) and find(page, "#error").get_attribute("hidden")


def test_error_of_the_host_is_said_once_with_the_names_of_the_form(page, screenshots):
    fill(page, "prompt", "a yellow star")
    fill(page, "num_inference_steps", 0)
    find(page, "#generate").click()
    assert find(page, "#error").text.startswith("Steps: ")
    page.execute_script("document.getElementById('field-num_inference_steps').min = ''")
    find(page, "#generate").click()
    until(page, lambda: "Steps=0 is not allowed" in find(page, "#error").text)
    assert find(page, "body").text.count("is not allowed") == 1
    assert find(page, "#error").get_attribute("role") == "alert"
    assert is_in_view(page, "#error") and is_directly_below(page, "#error", "#generate")
    assert find(page, "#field-prompt").get_attribute("value") == "a yellow star"
    page.save_screenshot(screenshots / "error.png")


def test_jobs_of_this_browser_are_back_after_a_reload_and_are_used_again(page, screenshots):
    fill(page, "prompt", "a purple cat")
    fill(page, "negative_prompt", "a dog")
    fill(page, "num_inference_steps", 3)
    fill(page, "guidance_scale", 1.5)
    find(page, "#generate").click()
    until(page, lambda: "3 steps" in caption(page))
    seed = re.search(r"seed (\d+)", caption(page)).group(1)
    generate_long(page, "a yellow star")
    until(page, lambda: caption(page).startswith("Step "))
    reload(page)
    until(page, lambda: caption(page).startswith("Step "))  # the running one is followed again
    until(page, lambda: find(page, "#gallery li:first-child img"))
    assert texts(page, "#gallery li")[0] == f"a purple cat seed {seed}"
    find(page, "#cancel").click()
    until(page, lambda: caption(page) == "Cancelled")
    assert value(page, "prompt") == "" and value(page, "num_inference_steps") == "20"
    find(page, "#gallery li:first-child button").click()
    until(page, lambda: f"seed {seed}" in caption(page))
    find(page, "#again").click()
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "width")
    found = [value(page, name) for name in names]
    assert found == ["a purple cat", "a dog", "3", "1.5", seed, "128"]
    page.save_screenshot(screenshots / "history.png")


def test_job_that_the_host_has_lost_keeps_its_settings(page):
    record = {"id": "lost", "settings": {"prompt": "a lost key", "seed": 7}, "images": []}
    page.execute_script(
        "const jobs = JSON.parse(localStorage.getItem('jobs') || '[]');"
        "localStorage.setItem('jobs', JSON.stringify([...jobs, arguments[0]]))",
        record,
    )
    reload(page)
    until(page, lambda: texts(page, "#gallery div") == ["No longer on the host"])
    find(page, "#gallery li:first-child button").click()
    find(page, "#again").click()
    assert [value(page, "prompt"), value(page, "seed")] == ["a lost key", "7"]
    find(page, "#forget").click()
    assert not texts(page, "#gallery li")
    assert page.execute_script("return localStorage.getItem('jobs')") == "[]"


def test_image_becomes_the_input_image_with_its_thumbnail_and_is_cleared(page):
    assert value(page, "strength") == "0.8"
    fill(page, "prompt", "a green heart")
    fill(page, "num_inference_steps", 2)
    find(page, "#generate").click()
    until(page, lambda: "2 steps" in caption(page))
    find(page, "#as-input").click()
    until(page, lambda: is_shown(page, ".image-field img"))
    assert value(page, "init_image").endswith(".png")
    find(page, ".image-field .quiet").click()
    assert value(page, "init_image") == "" and not is_shown(page, ".image-field img")


def test_mask_is_painted_over_the_input_image(page, tmp_path, screenshots):
    from selenium.webdriver import ActionChains

    page.execute_script("arguments[0].click()", find(page, "#paint"))
    until(page, lambda: "Choose an input image first" in find(page, "#error").text)
    Image.new("RGB", (160, 80), "teal").save(tmp_path / "input.png")
    find(page, "#field-init_image").send_keys(str(tmp_path / "input.png"))
    page.execute_script("arguments[0].click()", find(page, "#paint"))
    canvas = until(page, lambda: find(page, "#brush canvas"))
    buttons = {one.text: one for one in page.find_elements("css selector", "#brush button")}
    buttons["Use mask"].click()
    until(page, lambda: "Nothing is painted" in find(page, "#brush .hint").text)
    drag = ActionChains(page).move_to_element(canvas).click_and_hold()
    drag.move_by_offset(30, 0).release().perform()
    page.save_screenshot(str(screenshots / "mask.png"))
    buttons["Use mask"].click()
    until(page, lambda: not find(page, "#brush"))
    painted = page.execute_async_script(
        """const [done] = arguments;
        createImageBitmap(document.getElementById("field-mask_image").files[0]).then((image) => {
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [image.width, image.height];
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          const at = (x, y) => context.getImageData(x, y, 1, 1).data[0];
          done([image.width, image.height, at(80, 40), at(1, 1), at(158, 78)]);
        });"""
    )
    assert painted == [160, 80, 255, 0, 0]
    page.execute_script("arguments[0].click()", find(page, "#paint"))
    again = until(page, lambda: find(page, "#brush canvas"))
    is_kept = "return arguments[0].getContext('2d').getImageData(80, 40, 1, 1).data[3]"
    assert page.execute_script(is_kept, again) == 255
    next(
        one for one in page.find_elements("css selector", "#brush button") if one.text == "Cancel"
    ).click()
    num_before = len(texts(page, "#gallery li"))
    fill(page, "prompt", "a painted door")
    fill(page, "num_inference_steps", 4)
    page.execute_script("arguments[0].click()", find(page, "#generate"))
    until(page, lambda: len(texts(page, "#gallery li")) > num_before)
    assert not texts(page, "#error") or find(page, "#error").text == ""
    for clear in page.find_elements("css selector", ".image-field .quiet"):
        page.execute_script("arguments[0].click()", clear)


def test_image_is_pasted_or_dropped_into_its_field_and_other_files_are_refused(page, host):
    give_file(page, "paste", "a.png", "image/png")
    assert value(page, "init_image").endswith("a.png") and is_shown(page, ".image-field img")
    give_file(page, "drop", "b.webp", "image/webp")
    assert value(page, "init_image").endswith("b.webp")
    give_file(page, "drop", "c.pdf", "application/pdf")
    assert find(page, "#error").text == "c.pdf is not a PNG, JPEG or WebP image."
    assert value(page, "init_image").endswith("b.webp")


def test_phone_shows_the_prompt_and_its_image_together(page):
    size(page, 390, 844)
    fill(page, "num_inference_steps", 2)
    fill(page, "prompt", "a green heart")
    find(page, "#generate").click()
    until(page, lambda: "2 steps" in caption(page))
    assert all(is_in_view(page, each) for each in ("#field-prompt", "#canvas", "#caption"))
    size(page, 390, 500)  # lower than the image
    find(page, "#generate").click()
    until(page, lambda: is_in_view(page, "#caption"))


def test_job_of_the_first_moment_is_not_taken_for_one_that_the_host_lost(page, host):
    """The list that the page asks for when it is loaded was made before the job."""
    script = """const plain = window.fetch; let isFirst = true;
    window.fetch = async (path, ...rest) => {
      const answer = await plain(path, ...rest);
      if (path !== "v1/jobs" || rest[0]?.method || !isFirst) return answer;
      isFirst = false;
      await new Promise((resolve) => { window.answerJobs = resolve; });
      return answer;
    };"""
    added = page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        reload(page)
        until(page, lambda: page.execute_script("return Boolean(window.answerJobs)"))
        fill(page, "prompt", "a green heart")
        fill(page, "num_inference_steps", 40)
        find(page, "#generate").click()
        until(page, lambda: caption(page))
        page.execute_async_script("window.answerJobs(); setTimeout(arguments[0], 200)")
        assert "No longer" not in caption(page) + "".join(texts(page, "#gallery li"))
        until(page, lambda: "40 steps" in caption(page))
    finally:
        page.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_each_image_of_one_call_is_shown_in_turn(browser):  # noqa: F811
    """A class that makes several images in one call, such as QwenImageLayered."""
    with ReadingHost(num_frames=3) as layered, served(layered.client.application) as address:
        browser.get(address)
        until(browser, lambda: find(browser, "#field-prompt"))
        fill(browser, "prompt", "a cat")
        find(browser, "#generate").click()
        seen = []
        for number in (1, 2, 3, 1):
            button = find(browser, "#next")
            until(browser, lambda: button.text == f"Image {number} of 3: show the next")
            seen.append(find(browser, "#canvas img").get_attribute("src"))
            assert find(browser, "#download").get_attribute("href") == seen[-1]
            assert find(browser, "#download").get_attribute("download").endswith(f"-{number}.png")
            button.click()
    assert len(set(seen)) == 3 and seen[3] == seen[0]


@contextlib.contextmanager
def served(application):
    """The address of this application on a server of its own."""
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join(timeout=20)


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
