"""What a person does with the page, from the first image to the next day: in a real browser, on a
host of two ranks with LoRAs and two models.
"""

import base64
import io
import json
import re

import pytest
from PIL import Image

from tests.checkpoints import checkpoint, lora
from tests.hosts.harness import start_launcher
from tests.hosts.http.browser import (
    browser,  # noqa: F401  a fixture
    caption,
    fill,
    find,
    pytestmark,  # noqa: F401  needs a browser
    reload,
    source,
    texts,
    until,
    value,
)

STEPS = 200
"""Of a job that must still run when a rank is killed in its first steps."""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "base").symlink_to(checkpoint("sdxl"))
    (folder / "old").symlink_to(checkpoint("sd1"))
    with start_launcher(
        f"--models={folder}",
        f"--lora_dir={lora('sdxl').parent}",
        "--backend=distrifuser",
        "--nproc_per_node=2",
        "--height=64",
        "--width=64",
    ) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def page(host, browser):  # noqa: F811
    browser.get(host.url("/"))
    until(browser, lambda: find(browser, "#field-prompt"))
    return browser


def click(page, element):
    """Also where it is outside the window."""
    page.execute_script("arguments[0].click()", element)


def paste(page, image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    page.execute_script(
        """const bytes = Uint8Array.from(atob(arguments[0]), (one) => one.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
        const facts = { bubbles: true, cancelable: true, clipboardData: data };
        document.querySelector(".image-field").dispatchEvent(new ClipboardEvent("paste", facts));
        """,
        base64.b64encode(buffer.getvalue()).decode(),
    )


def paint_mask(page):
    from selenium.webdriver import ActionChains

    click(page, find(page, "#paint"))
    canvas = until(page, lambda: find(page, "#brush canvas"))
    drag = ActionChains(page).move_to_element(canvas).click_and_hold()
    drag.move_by_offset(15, 0).release().perform()
    buttons = {one.text: one for one in page.find_elements("css selector", "#brush button")}
    buttons["Use mask"].click()
    until(page, lambda: value(page, "mask_image"))


def add_lora(page, name, weight):
    choice = until(page, lambda: find(page, f"#add-lora option[value^='{name}']"))
    click(page, find(page, "#more summary"))
    page.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))",
        find(page, "#add-lora"),
        choice.get_attribute("value"),
    )
    page.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
        find(page, ".loras input"),
        str(weight),
    )


def test_masked_image_with_a_lora_outlives_a_rank_and_a_reload_and_gives_its_seed(page, host):
    file = lora("sdxl").name
    paste(page, Image.new("RGB", (64, 64), "teal"))
    paint_mask(page)
    add_lora(page, file.split(".")[0], 0.7)
    assert json.loads(value(page, "lora")) == {file: 0.7}
    fill(page, "prompt", "a red car")
    fill(page, "num_inference_steps", STEPS)
    click(page, find(page, "#generate"))
    until(page, lambda: re.match(r"Step [1-9]", caption(page)), 120)
    host.ranks()[1].kill()
    until(page, lambda: "steps," in caption(page) and source(page).startswith("blob:"), 180)
    assert find(page, "#error").get_attribute("hidden")
    seed = re.search(r"seed (\d+)", caption(page)).group(1)
    job = host.get("/v1/jobs").json()["jobs"][0]
    settings = host.get(f"/v1/jobs/{job['id']}").json()["settings"]
    assert (job["attempts"], job["model"]) == (2, "base")
    assert [path.rpartition("/")[2] for path in settings["lora"]] == [file]
    reload(page)
    until(page, lambda: find(page, "#gallery li:first-child img"))
    assert texts(page, "#gallery li")[0] == f"a red car seed {seed}"
    find(page, "#gallery li:first-child button").click()
    until(page, lambda: f"seed {seed}" in caption(page))
    click(page, find(page, "#again"))
    until(page, lambda: value(page, "seed") == seed)
    assert (value(page, "prompt"), json.loads(value(page, "lora"))) == ("a red car", {file: 0.7})
    assert texts(page, ".loras li") and "Input image, Mask" in find(page, "#note").text


def test_several_images_have_seeds_in_a_row(page):
    fill(page, "prompt", "a green tree")
    fill(page, "num_inference_steps", 2)
    fill(page, "seed", 30)
    page.execute_script("document.getElementById('count').value = 3")
    click(page, find(page, "#generate"))
    wanted = [f"a green tree seed {seed}" for seed in (32, 31, 30)]
    until(page, lambda: sorted(texts(page, "#gallery li")[:3]) == sorted(wanted))
    page.execute_script("document.getElementById('count').value = 17")
    click(page, find(page, "#generate"))
    until(page, lambda: "choose a number from 1 to 16" in find(page, "#error").text)


def test_another_model_has_a_form_of_its_own_and_keeps_the_prompt(page, host):
    assert texts(page, "#field-model option") == ["base", "old"]
    fill(page, "prompt", "a blue boat")
    page.execute_script(
        "arguments[0].value = 'old'; arguments[0].dispatchEvent(new Event('change'))",
        find(page, "#field-model"),
    )
    until(page, lambda: "Stable Diffusion 1" in page.title)
    assert (value(page, "prompt"), value(page, "model")) == ("a blue boat", "old")
    fill(page, "num_inference_steps", 2)
    click(page, find(page, "#generate"))
    until(page, lambda: "2 steps" in caption(page), 120)
    assert host.get("/v1/jobs").json()["jobs"][0]["model"] == "old"
    reload(page)
    until(page, lambda: find(page, "#gallery li:first-child img"))
    find(page, "#gallery li:first-child button").click()
    click(page, find(page, "#again"))
    until(page, lambda: value(page, "model") == "old")
    assert value(page, "prompt") == "a blue boat"


def test_settings_are_taken_from_an_image_of_this_host_and_of_a1111(page, host, tmp_path):
    fields = {"prompt": "a grey cat", "seed": 77, "num_inference_steps": 3, "guidance_scale": 4.5}
    made = host.session.post(
        host.url("/v1/images/generations"),
        json={**fields, "response_format": "url"},
        timeout=120,
    ).json()
    own = tmp_path / "own.png"
    own.write_bytes(host.session.get(made["data"][0]["url"], timeout=20).content)
    body = {"prompt": "a white dog", "seed": 78, "steps": 2, "cfg_scale": 3}
    other = host.session.post(host.url("/sdapi/v1/txt2img"), json=body, timeout=120).json()
    theirs = tmp_path / "theirs.png"
    theirs.write_bytes(base64.b64decode(other["images"][0]))
    names = ("prompt", "seed", "num_inference_steps", "guidance_scale")
    for file, wanted in (
        (own, ["a grey cat", 77, 3, 4.5]),
        (theirs, ["a white dog", 78, 2, 3]),
    ):
        find(page, "#png").send_keys(str(file))
        until(page, lambda file=file: file.name in find(page, "#note").text)
        prompt, *numbers = (value(page, name) for name in names)
        assert [prompt, *map(float, numbers)] == wanted
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    find(page, "#png").send_keys(str(tmp_path / "plain.png"))
    until(page, lambda: find(page, "#error").text == "plain.png holds no settings.")
