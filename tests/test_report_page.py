"""The page of evaluate.py --report in Chromium: it is drawn, it shows the text that is pointed at, runs nothing of the user's, asks nobody.

Skipped without Chromium, its driver and selenium (requirements-extras.txt).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_pages import hostile_rows, make_page

pytest.importorskip("plotly", reason="plotly (requirements.txt) is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium (requirements-extras.txt) is not installed")
CHROMIUM, DRIVER = (
    next(filter(None, map(shutil.which, names)), None) for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
)
if not CHROMIUM or not DRIVER:
    pytest.skip("Chromium and chromedriver are not installed", allow_module_level=True)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)
# scrolls to the map and gives where on the screen a point of its first panel is
PLACE = """
const map = document.getElementById("map"), layout = map._fullLayout, trace = map._fullData[0];
map.scrollIntoView();
const box = map.getBoundingClientRect();
return [box.left + layout.xaxis._offset + layout.xaxis.l2p(trace.x[arguments[0]]),
        box.top + layout.yaxis._offset + layout.yaxis.l2p(trace.y[arguments[0]])];
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    make_page(folder / "r.html", hostile_rows(folder / "mine.jsonl"))
    return folder / "r.html"


@pytest.fixture(params=["webgl", "svg"])
def browser(request, written, tmp_path) -> Iterator:
    """The page, drawn; once where the browser has no WebGL."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    without = ("--disable-3d-apis",) if request.param == "svg" else ("--enable-unsafe-swiftshader",)
    for flag in (*FLAGS, *without, f"--user-data-dir={tmp_path}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(written.as_uri())
        wait_for(driver, "return document.body.dataset.drawn")
        assert driver.execute_script("return document.body.dataset.drawn") == request.param
        yield driver
    finally:
        driver.quit()


def wait_for(driver, script: str):
    """What the script returns, as soon as that is something."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 60).until(lambda d: d.execute_script(script))


def point_at(driver, x: float, y: float) -> None:
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(driver)
    actions.pointer_action.move_to_location(round(x), round(y))
    actions.perform()


def test_the_page_is_drawn_and_shows_the_text_that_is_pointed_at(browser):
    assert browser.execute_script("return document.getElementById('map').data.map((trace) => trace.text.length)") == [63, 63]
    point_at(browser, *browser.execute_script(PLACE, 4))
    shown = wait_for(browser, "return document.querySelector('#map .hoverlayer .hovertext')?.textContent")
    texts = browser.execute_script("return data.maps[0].texts")
    assert any(text[:40] in shown.replace("\u2068", "").replace("\u2069", "") for text in texts)
    assert wait_for(browser, "return document.querySelectorAll('#map .shapelayer path').length") == 1  # the ring on the other side


def test_a_class_can_be_chosen(browser):
    browser.execute_script("const choice = document.getElementById('class'); choice.value = 1; choice.onchange();")
    opacities = wait_for(browser, "return document.getElementById('map').data[1].marker.opacity")
    codes = browser.execute_script("return Array.from(numbers(data.maps[0].codes))")
    assert [opacity == 1 for opacity in opacities] == [code == 1 for code in codes]
    assert browser.execute_script("return document.querySelectorAll('#legend button').length") == 3


def test_nothing_of_the_users_runs_and_nobody_is_asked(browser, written):
    point_at(browser, *browser.execute_script(PLACE, 0))
    wait_for(browser, "return document.querySelector('#map .hoverlayer .hovertext')?.textContent")
    assert browser.execute_script("return [window.harmed ?? null, document.querySelectorAll('img, #map a, i').length]") == [None, 0]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("chrome", "data:", "blob:"))} == {written.as_uri()}
