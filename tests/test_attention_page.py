"""The page of attention.py: what is in it, and in Chromium that sliders move, numbers are shown, nothing runs and nobody is asked.

What is done in Chromium is skipped without it, its driver and selenium (requirements-extras.txt).
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from attention_folders import SIDES, hostile, long_text, make_corpus, make_texts, sentence
from report_pages import data_of

from attention_analysis import html
from attention_analysis.looking import text_of
from attention_analysis.stored import read_texts


def unpacked(item: dict, n_sides: int, n_layers: int) -> np.ndarray:
    """(S, L, H, T) of a text in the page."""
    roots = np.frombuffer(base64.b64decode(item["weights"]), "<u2").astype(float) / 65535
    return (roots**2).reshape(n_sides, n_layers, item["heads"], len(item["pieces"]))


def page_of(folder: Path) -> dict:
    return data_of(html.write_page(folder))


def test_all_weights_are_in_the_page(tmp_path):
    stored = make_texts(tmp_path / "out", [sentence(), hostile()])
    data = page_of(tmp_path / "out")
    assert data["sides"] == list(SIDES) and data["texts"][0]["title"] == "the swallowed card."
    weights = unpacked(data["texts"][0], 3, 3)
    np.testing.assert_allclose(weights, stored.weights[:, :9].transpose(0, 2, 3, 1), atol=2e-5)
    assert data["texts"][0]["words"][:5] == [
        *([0, 1, "", "bos", "<s>"], [1, 2, " ", "prefix", "See"], [2, 3, "", "prefix", ":"]),
        *([3, 4, " ", "function", "the"], [4, 6, " ", "content", "swallowed"]),
    ]


def test_nothing_that_cannot_be_seen_or_turns_the_direction_of_writing_reaches_the_page(tmp_path):
    make_texts(tmp_path / "out", [hostile()])
    data = page_of(tmp_path / "out")
    shown = [word for *_, word in data["texts"][0]["words"]]
    assert all(shown) and {"שלום", "مرحبا", "犬", "U+200B", "return"} <= set(shown)
    assert not {"\x07", "\x1b", "\u202e"} & set("".join([*shown, *data["texts"][0]["pieces"], data["texts"][0]["title"]]))
    assert max(map(len, shown)) <= 60


def test_the_middle_of_a_long_text_stands_together_by_category(tmp_path):
    stored = make_texts(tmp_path / "out", [long_text(html.MOST_TOKENS + 500)], n_layers=2, n_heads=2)
    (item,) = page_of(tmp_path / "out")["texts"]
    assert item["note"].startswith("500 tokens in the middle are left out here")
    assert len(item["pieces"]) == html.MOST_TOKENS + 2 and sum(item["folded"]) == 2
    assert [piece for piece, folded in zip(item["pieces"], item["folded"], strict=True) if folded] == [
        *("[250 tokens: content words]", "[250 tokens: function words]"),
    ]
    weights = unpacked(item, 3, 2)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-2)
    content = np.array(item["categories"]) == "content"
    np.testing.assert_allclose(weights[..., content].sum(-1), stored.weights[:, 2::2].sum(1), atol=1e-2)


def test_a_page_is_bounded_and_says_what_is_left_out(tmp_path, monkeypatch):
    make_texts(tmp_path / "out", [sentence()] * 3)
    assert 'left-out">' not in html.write_page(tmp_path / "out").read_text("utf-8")
    monkeypatch.setattr(html, "MOST_BYTES", 2000)  # of 864 a text
    assert len(page_of(tmp_path / "out")["texts"]) == 2
    assert "This page has the first 2 of 3 texts" in (tmp_path / "out" / "page.html").read_text("utf-8")
    monkeypatch.setattr(html, "MOST_BYTES_OF_TEXT", 800)
    items = page_of(tmp_path / "out")["texts"]
    assert [item["heads"] for item in items] == [1] * 3 and "All heads would not fit" in items[0]["note"]
    expected = read_texts(tmp_path / "out").weights[:, :9].mean(3).transpose(0, 2, 1)
    np.testing.assert_allclose(unpacked(items[0], 3, 3)[:, :, 0], expected, atol=2e-5)


def test_an_untuned_model_has_no_slider_of_sides(tmp_path):
    make_texts(tmp_path / "out", [sentence()], ("base",), n_heads=1)
    text = html.write_page(tmp_path / "out").read_text("utf-8")
    assert 'id="layer"' in text and 'id="side"' not in text
    make_corpus(tmp_path / "corpus", ("base",), seeds=0)
    assert 'id="side"' not in html.write_page(tmp_path / "corpus").read_text("utf-8")


def test_a_corpus_has_its_means_and_intervals_in_the_page(tmp_path):
    stored = make_corpus(tmp_path / "out")
    data = page_of(tmp_path / "out")
    assert data["shown"]["false"] == ["prefix", "suffix", "content", "function", "punctuation"]
    wanted = {"side": "step 10", "layer": 2, "category": "content", "bos": False}
    for name, rows in (("shares", stored.about["shares"]), ("less", stored.about["differences"])):
        row = next(row for row in rows if wanted.items() <= row.items())
        assert data[name]["false"][1][2][2] == pytest.approx([100 * row[key] for key in ("mean", "low", "high")], abs=1e-3)
    assert data["less"]["true"][0] == [[None] * 6] * 4


# ------------------------------------------------------------------------------------------------------------ in Chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pages of texts, the second of which is hostile, of a corpus, and of an untuned model."""
    folder = tmp_path_factory.mktemp("pages")
    make_texts(folder / "texts", [sentence(), hostile(), long_text(html.MOST_TOKENS + 500)])
    make_texts(folder / "base", [sentence()], ("base",), n_heads=1)
    make_corpus(folder / "corpus")
    for name in ("texts", "base", "corpus"):
        html.write_page(folder / name)
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator:
    from test_report_page import CHROMIUM, DRIVER, FLAGS, webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(chromium, folder: Path, name: str):
    """The page, drawn."""
    from test_report_page import wait_for

    chromium.get((folder / name / "page.html").as_uri())
    wait_for(chromium, "return document.body.dataset.drawn")
    return chromium


def slide(driver, name: str, value: int) -> str:
    """Move a slider as a user would -> what stands beside it."""
    script = """const slider = pick(arguments[0]); slider.value = arguments[1]; slider.dispatchEvent(new Event("input"));
    return slider.parentElement.querySelector("output").textContent"""
    return driver.execute_script(script, name, value)


def hover_over(driver, word: int, block: int = 1) -> str:
    """Point at a word of the lower block -> what the tip says."""
    from test_report_page import point_at, wait_for

    script = """const word = document.querySelectorAll(".words")[arguments[1]].querySelector(`[data-word="${arguments[0]}"]`);
    word.scrollIntoView({ block: "center" });
    const box = word.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2]"""
    point_at(driver, *driver.execute_script(script, word, block))
    return wait_for(driver, "return pick('tip').hidden ? '' : pick('tip').innerText").replace("\u2068", "").replace("\u2069", "")


def shades(driver) -> list[str]:
    return driver.execute_script("return [...document.querySelectorAll('.words span')].map((word) => word.style.backgroundColor)")


def test_sliders_move_and_a_word_says_its_number(chromium, folder):
    page, weights = opened(chromium, folder, "texts"), text_of(read_texts(folder / "texts"), 0).weights
    before = shades(page)
    assert hover_over(page, 4).splitlines()[:3] == [
        "swallowed: content words",
        *(f"{side}: {100 * weights[i, 4:6, -1].mean(1).sum():.2f} %" for i, side in ((0, "base"), (2, "adapter"))),
    ]
    said = [slide(page, "layer", 2), slide(page, "head", 3), slide(page, "side", 1)]
    assert said == ["2 of 3", "3 of 4", "step 10"] and shades(page) != before
    said = hover_over(page, 4).splitlines()
    assert said[2] == f"step 10: {100 * weights[1, 4:6, 1, 2].sum():.2f} %"
    assert said[3].strip() == f"token swallow: {100 * weights[0, 4, 1, 2]:.2f} %, {100 * weights[1, 4, 1, 2]:.2f} %"
    page.execute_script("pick('without-bos').click()")
    rest = weights[1, :, 1, 2] / weights[1, 1:, 1, 2].sum()
    assert hover_over(page, 4).splitlines()[2] == f"step 10: {100 * rest[4:6].sum():.2f} %"
    assert slide(page, "layer", 0) == "mean over layers"
    rest = (weights[1, :, :, 2] / weights[1, 1:, :, 2].sum(0)).mean(1)
    assert hover_over(page, 4).splitlines()[2] == f"step 10: {100 * rest[4:6].sum():.2f} %"


def test_the_bars_of_a_text_are_its_shares(chromium, folder):
    page, text = opened(chromium, folder, "texts"), text_of(read_texts(folder / "texts"), 0)
    bars = page.execute_script("return Object.fromEntries(pick('shares').data.map((bar) => [bar.name, bar.x]))")
    expected = text.shares(text.last_layer())["content"]
    assert bars["content words"] == pytest.approx([100 * expected[side] for side in SIDES], abs=0.01)


def test_a_click_on_a_head_shows_it(chromium, folder):
    page = opened(chromium, folder, "texts")
    page.execute_script("pick('heads').emit('plotly_click', { points: [{ x: 4, y: 1, curveNumber: 1 }] })")
    outputs = page.execute_script("return [...document.querySelectorAll('output')].map((output) => output.textContent)")
    assert outputs == ["1 of 3", "4 of 4", "adapter"]


def test_every_text_can_be_chosen(chromium, folder):
    page = opened(chromium, folder, "texts")
    page.execute_script("pick('text').value = 2; return pick('text').onchange()")
    assert "500 tokens in the middle are left out here" in page.execute_script("return pick('note').textContent")
    assert page.execute_script("return document.querySelectorAll('.words span').length") > 2 * html.MOST_TOKENS
    said = hover_over(page, html.MOST_TOKENS // 2)
    assert said.startswith("[250 tokens: content words]: content words")


def test_a_corpus_has_its_numbers_at_every_layer(chromium, folder):
    page, stored = opened(chromium, folder, "corpus"), data_of(folder / "corpus" / "page.html")
    drawn = "return pick('shares').data.map((line) => line.y)"
    assert page.execute_script(drawn) == [[stored["shares"]["true"][s][3][c][0] for s in range(3)] for c in range(6)]
    assert slide(page, "layer", 0) == "mean over layers"
    assert page.execute_script(drawn)[3] == [stored["shares"]["true"][s][0][3][0] for s in range(3)]
    page.execute_script("pick('without-bos').click()")
    assert len(page.execute_script(drawn)) == 5
    assert slide(page, "side", 1) == "step 10"
    assert page.execute_script("return pick('layers').data[1].z[0][2]") == stored["less"]["false"][1][1][2][0]


def test_a_point_of_a_curve_says_its_interval(chromium, folder):
    from test_report_page import point_at, wait_for

    page = opened(chromium, folder, "corpus")
    place = """const box = pick("shares").getBoundingClientRect(), { xaxis, yaxis } = pick("shares")._fullLayout;
    return [box.left + xaxis._offset + xaxis.d2p(1), box.top + yaxis._offset + yaxis.d2p(pick("shares").data[3].y[1])]"""
    point_at(page, *page.execute_script(place))
    shown = wait_for(page, "return document.querySelector('#shares .hoverlayer .hovertext')?.textContent")
    mean, low, high = data_of(folder / "corpus" / "page.html")["shares"]["true"][1][3][3]
    assert f"{mean:.1f} % ({low:.1f} to {high:.1f})" in shown


@pytest.mark.parametrize("name", ["texts", "base", "corpus"])
def test_nothing_of_the_users_runs_and_nobody_is_asked(chromium, folder, name):
    chromium.get_log("browser"), chromium.get_log("performance")
    page = opened(chromium, folder, name)
    if name == "texts":
        page.execute_script("pick('text').value = 1; return pick('text').onchange()")
        hover_over(page, 1)
        hover_over(page, 9)
    assert page.execute_script("return [window.harmed ?? null, document.querySelectorAll('img, i, #looks b').length]") == [None, 0]
    assert not [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("chrome", "data:", "blob:"))} == {(folder / name / "page.html").as_uri()}
