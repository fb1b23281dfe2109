"""The page in a real browser, headless: what a reader does with it, by mouse and by keyboard, in both themes."""

import base64
import json
import shutil
import time

import numpy as np
import pytest
import torch

from recurrent_depth.analysis.convergence import in_order
from recurrent_depth.analysis.page import PAGE_STEPS, PAGE_TOKENS, write_page
from recurrent_depth.analysis.recording import create, load

pytestmark = pytest.mark.page
PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver"}


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that records console messages."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed, and the page is tested in it: apt-get install {package}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """The page, and what a test does with it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, *, width=1200, height=900, dark=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        self.driver.get(f"file://{path}")

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def texts(self, css):
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css
        )

    def style(self, css, name):
        return self.driver.execute_script(
            "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", css, name
        )

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def hover(self, element):
        from selenium.webdriver import ActionChains

        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).perform()

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def chart(self, name):
        """Scroll to a chart and return its SVG when it is drawn."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.find(f"#{name}"))
        until = time.monotonic() + 10
        while time.monotonic() < until:
            found = self.driver.find_elements("css selector", f"#{name} svg")
            if found:
                return found[-1]
            time.sleep(0.05)
        raise AssertionError(f"the chart {name} was not drawn")


@pytest.fixture
def opened(browser, analysed):
    page = Page(browser)
    page.open(analysed / "index.html")
    return page


def answers_of(page, step):
    """Return the most probable token of every token at an iteration, from the data on the page."""
    return [page["vocabulary"][number] for number in page["arrays"]["top_ids"][step - 1, :, 0]]


def visible(text):
    """Return a token as the page shows it."""
    core = text.strip(" ")
    left, right = text.partition(core)[::2] if core else (text, "")
    shown = left.replace(" ", "·") + core + right.replace(" ", "·")
    return shown.replace("\n", "⏎") or "∅"


def test_slider_changes_the_answers(opened, page):
    for step in (1, 5, 12):
        slider = "const s = document.getElementById('iteration'); s.value = arguments[0];"
        opened.driver.execute_script(slider + "s.dispatchEvent(new Event('input'))", step - 1)
        assert opened.texts(".token small") == [visible(text) for text in answers_of(page, step)]
        assert opened.find("#step").text == f"{step} of 12"
    assert len({tuple(answers_of(page, step)) for step in (1, 5, 12)}) > 1
    assert opened.errors() == []


def test_selected_token_shows_its_candidates_and_path(opened, page):
    opened.driver.find_elements("css selector", ".token")[3].click()
    assert opened.texts(".token[aria-pressed=true] span") == [visible(page["vocabulary"][page["arrays"]["ids"][3]])]
    shown = opened.texts("#candidates code")
    step = int(opened.find("#iteration").get_attribute("value"))
    arrays = page["arrays"]
    assert shown == [visible(page["vocabulary"][number]) for number in arrays["top_ids"][step, 3]]
    assert opened.texts("#candidates span") == [f"{100 * p:.1f}%" for p in arrays["top_probabilities"][step, 3]]
    for name in ("answer", "path", "distance", "heat", "times", "change", "entropy", "health", "paths"):
        assert opened.chart(name).is_displayed()
    assert opened.errors() == []


def test_stop_times_in_order_follow_the_windows(opened, page):
    first = torch.from_numpy(page["arrays"]["exits"][0].astype(np.int64))
    parts = [in_order(part[None], 99)[0] for part in first.split([window["count"] for window in page["windows"]])]
    found = opened.driver.execute_script("return stopTimes(0, true).map(t => isFinite(t) ? t : 99)")
    assert found == torch.cat(parts).tolist()
    assert max(found) > 1


def test_hover_shows_details(opened, page):
    token = opened.driver.find_elements("css selector", ".token")[2]
    opened.hover(token)
    tip = opened.find("#tip")
    assert tip.is_displayed()
    assert "token 2, iteration 4" in tip.text
    assert "final answer" in tip.text
    opened.hover(opened.chart("heat"))
    assert tip.is_displayed()
    assert "distance" in tip.text
    opened.chart("heat").click()
    assert opened.errors() == []


def test_keyboard_alone_reaches_everything(opened):
    from selenium.webdriver import Keys

    reached = []
    for _ in range(12):
        opened.press(Keys.TAB)
        active = opened.driver.switch_to.active_element
        reached.append(active.get_attribute("id") or active.get_attribute("class").split()[0])
    assert [name for name in reached if name in ("theme", "play", "iteration", "colour", "ordered", "token")] == [
        "theme", "play", "iteration", "colour", "ordered", "token",
    ]  # fmt: skip
    opened.find(".token[tabindex='0']").send_keys(Keys.ARROW_RIGHT)
    assert opened.driver.switch_to.active_element.get_attribute("data-token") == "1"
    assert opened.find("#tip").is_displayed()
    before = int(opened.find("#iteration").get_attribute("value"))
    opened.press(Keys.ARROW_UP)
    assert int(opened.find("#iteration").get_attribute("value")) == before + 1
    opened.press(Keys.END)
    tokens = len(opened.texts(".token"))
    assert opened.driver.switch_to.active_element.get_attribute("data-token") == str(tokens - 1)
    opened.press(Keys.ESCAPE)
    assert not opened.find("#tip").is_displayed()
    assert opened.errors() == []


def test_play_runs_to_the_last_iteration(opened):
    opened.driver.execute_script("setStep(10)")
    opened.find("#play").click()
    time.sleep(1.2)
    assert opened.find("#step").text == "12 of 12"
    assert opened.find("#play").text == "Play"


def test_colours_follow_the_choice(opened, page):
    from selenium.webdriver.support.select import Select

    seen = set()
    for option in [o.get_attribute("value") for o in Select(opened.find("#colour")).options]:
        Select(opened.find("#colour")).select_by_value(option)
        script = "return [...document.querySelectorAll('.token')].map(e => e.style.background).join()"
        seen.add(opened.driver.execute_script(script))
        assert opened.find("#colour-text").text.startswith("Colour:")
    assert len(seen) >= 6
    assert opened.errors() == []


def test_dark_mode_by_system_and_by_button(browser, analysed, tmp_path):
    page = Page(browser)
    page.open(analysed / "index.html", dark=True)
    dark = page.style("body", "backgroundColor")
    page.open(analysed / "index.html")
    light = page.style("body", "backgroundColor")
    assert light != dark
    page.find("#theme").click()
    assert page.style("body", "backgroundColor") == light
    page.find("#theme").click()
    assert page.style("body", "backgroundColor") == dark
    assert page.errors() == []


def test_tokens_are_readable_in_both_themes(browser, analysed):
    script = """
      const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
      return Math.min(...[...document.querySelectorAll('.token')].map((e) => {
        const [a, b] = [light(e.style.background), light(getComputedStyle(e).color)].sort((x, y) => x - y);
        return (b + 0.05) / (a + 0.05);
      }));"""
    page = Page(browser)
    for dark in (False, True):
        page.open(analysed / "index.html", dark=dark)
        assert page.driver.execute_script(script) >= 4.5


def test_phone_needs_no_sideways_scrolling(browser, analysed):
    page = Page(browser)
    page.open(analysed / "index.html", width=390, height=800)
    for name in ("answer", "heat", "times", "paths"):
        page.chart(name)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
    assert page.errors() == []


def test_chart_can_be_saved_as_svg(opened, tmp_path):
    opened.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    opened.chart("times")
    opened.driver.execute_script("document.querySelector('#times').closest('figure').querySelector('.save').click()")
    until = time.monotonic() + 10
    while not (saved := list(tmp_path.glob("*.svg"))) and time.monotonic() < until:
        time.sleep(0.05)
    assert saved[0].read_text().startswith("<svg")


@pytest.fixture(scope="module")
def large(tmp_path_factory, analysed):
    """A page with the most tokens and iterations."""
    folder = tmp_path_factory.mktemp("large")
    _, details = load(analysed)
    random = np.random.default_rng(0)
    sizes = {"steps": PAGE_STEPS, "tokens": PAGE_TOKENS, "windows": 1, "candidates": 5, "components": 3, "rules": 4,
             "seeds": 2, "chosen": 0, "width": 8}  # fmt: skip
    recording = create(folder, sizes)
    words = list(details["vocabulary"])
    for name in type(recording).__dataclass_fields__:
        array = getattr(recording, name)
        integers = np.issubdtype(array.dtype, np.integer)
        array[...] = random.integers(1, 3, array.shape) if integers else random.random(array.shape)
    recording.top_ids[...] = random.choice([int(word) for word in words], recording.top_ids.shape)
    details["windows"] = [
        {"name": "long", "first": 0, "ids": [int(word) for word in random.choice(words, PAGE_TOKENS)]}
    ]
    write_page(recording, details, [], folder / "index.html")
    return folder / "index.html"


def test_largest_page_is_small_and_paints_soon(browser, large):
    assert large.stat().st_size < 20e6
    page = Page(browser)
    page.open(large)
    assert len(page.texts(".token")) == PAGE_TOKENS
    paint = "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
    assert page.driver.execute_script(paint) < 2000, "milliseconds to the first paint, the bound of the design"
    assert page.errors() == []


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_screenshot_is_not_empty(browser, analysed, width, dark):
    page = Page(browser)
    page.open(analysed / "index.html", width=width, dark=dark)
    image = base64.b64decode(page.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])
    assert len(image) > 20_000
    assert json.loads(page.driver.execute_script("return JSON.stringify(state)"))["token"] == 0
