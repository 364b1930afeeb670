"""A real browser, and what tests ask of the page in it."""

import re
import shutil

import pytest

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
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    # the page may replace an element between finding and reading it
    wait = WebDriverWait(browser, within_s, 0.05, [StaleElementReferenceException])
    return wait.until(lambda _: condition())


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


def value(browser, name):
    return find(browser, f"#field-{name}").get_attribute("value")


def is_shown(browser, selector):
    return find(browser, selector).is_displayed()


def box(browser, selector):
    """Return the element's top and bottom in the window, and the window's height."""
    return browser.execute_script(
        "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [box.top, box.bottom, window.innerHeight]",
        selector,
    )


def is_in_view(browser, selector):
    top, bottom, height = box(browser, selector)
    return top >= 0 and bottom <= height + 1


def is_directly_below(browser, selector, other):
    return 0 <= box(browser, selector)[0] - box(browser, other)[1] < 40


def reload(browser):
    browser.refresh()
    until(browser, lambda: find(browser, "#field-prompt"))


def generate_long(browser, prompt):
    """Send a job that a test must cancel."""
    fill(browser, "prompt", prompt)
    fill(browser, "num_inference_steps", 900)
    find(browser, "#generate").click()


def give_file(browser, how, name, kind):
    """Paste or drop a file as the browser would report it."""
    browser.execute_script(
        """
        const [how, name, type] = arguments;
        const data = new DataTransfer();
        data.items.add(new File(["x"], name, { type }));
        const facts = { bubbles: true, cancelable: true };
        const event = how === "paste" ? new ClipboardEvent(how, { ...facts, clipboardData: data })
            : new DragEvent(how, { ...facts, dataTransfer: data });
        document.querySelector(".image-field").dispatchEvent(event);
        """,
        how,
        name,
        kind,
    )


def caption(browser):
    return texts(browser, "#caption")[0]


def source(browser):
    """Address of the image on show, or None; asked in one go, for a preview may be replaced between
    two questions.
    """
    return browser.execute_script("return document.querySelector('#canvas img')?.src")
