"""Pictures of attention, from made-up numbers."""

import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from attention_folders import SIDES, described, hostile, long_text, make_corpus, make_texts, sentence
from matplotlib import font_manager

import attention
from attention_analysis import pictures
from attention_analysis.corpus_pictures import draw_differences, draw_layers, draw_training
from attention_analysis.corpus_pictures import draw_heads as draw_corpus_heads
from attention_analysis.drawing import COLOURS, percent, style
from attention_analysis.fonts import Fonts, choose_fonts
from attention_analysis.looking import Text, corpus_of, spread, text_of
from attention_analysis.text_pictures import draw_bars, draw_heads, number_ticks
from attention_analysis.text_pictures import draw_layers as draw_text_layers
from attention_analysis.text_pictures import draw_training as draw_text_training
from attention_analysis.word_pictures import MOST_LINES, Shaded, cut_lines, draw_words, layout
from attention_analysis.words import words_of
from files.console import InputError

FONTS = Fonts(["DejaVu Sans"], set())
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _drawn_and_closed():
    with style(FONTS):
        yield
    plt.close("all")


def tokens_of(pieces: list[str], category: str = "content") -> list[dict]:
    return [described(piece, "text", category) for piece in pieces]


def text(tokens: list[dict], weights: list[list[float]] | None = None, sides: tuple[str, ...] = ("base", "adapter")) -> Text:
    """A text with one layer and one head, each side with the weights given, or all the same."""
    weights = weights or [[1 / len(tokens)] * len(tokens)] * len(sides)
    return Text(tokens, list(sides), np.array(weights, np.float32)[:, :, None, None])


# ----------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["My", " swallow", "ed", " card", "."], ["My", "swallowed", "card", "."]),
        (["don", "'t", " say", " '", "no", "'"], ["don't", "say", "'", "no", "'"]),
        (["我", "", "", "的", "", "", "卡片"], ["我", "的", "卡片"]),
        (["안", "녕", "하세요", " 세계"], ["안녕하세요", "세계"]),
        ([" ", "ا", "ل", "", " ", "ب"], ["ال", "ب"]),
        (["🤷", "", "🏽", "\u200d", "♀", "️", "🇩", "🇪", "!"], ["🤷🏽\u200d♀️", "🇩🇪", "!"]),
        (["e", "\u0301", "t"], ["e\u0301t"]),
        (["a", "\n\n", "b", "    ", "    c"], ["a", "⏎", "b", "␣", "c"]),
        (["ab" * 15, "cd" * 15], ["ab" * 15, "cd" * 15]),
        (["x", "_", "1", "(", "y", ")"], ["x_1", "(", "y", ")"]),
    ],
)
def test_words_are_made_of_tokens_as_they_are_read(pieces, words):
    made = words_of(tokens_of(pieces))
    assert [word.text for word in made] == words
    assert [i for word in made for i in range(word.start, word.stop)] == list(range(len(pieces)))


def test_words_end_where_part_or_category_ends():
    tokens = [described("See", "prefix", "prefix"), described("ing", "text", "content"), described("s", "text", "function")]
    assert [word.text for word in words_of(tokens)] == ["See", "ing", "s"]


def test_white_space_before_words_is_kept():
    gaps = [word.gap for word in words_of(tokens_of(["def", " f", ":", "\n   ", " return", " x", "\n"]))]
    assert gaps == ["", " ", "", "", "\n    ", " ", ""]


def place(words: list[str], width: float, gap: str = " ", leftwards: str = "שלום") -> list[list[tuple[str, float]]]:
    """Lines of words ten units wide a letter, between which a space is ten wide."""
    shaded = [Shaded(word, gap, [0.1], "content", word[0] in leftwards) for word in words]
    lines = layout(shaded, lambda text: 10 * len(text), width)
    return [[(placed.word.text, placed.x) for placed in line] for line in lines]


def test_lines_are_wrapped():
    assert place(["aa", "bb", "cc"], 60) == [[("aa", 0), ("bb", 34)], [("cc", 0)]]
    assert place(["a" * 50, "bb"], 60) == [[("a" * 50, 0)], [("bb", 0)]]
    assert place(["a", "b"], 60, gap="\n  ") == [[("a", 20)], [("b", 20)]]


def test_words_from_right_to_left_stand_in_that_order():
    (line,) = place(["a", "ש", ",", "ל", "b"], 200)
    assert [word for word, _ in sorted(line, key=lambda placed: placed[1])] == ["a", "ל", ",", "ש", "b"]
    xs = sorted(x for _, x in line)
    assert min(np.diff(xs)) == max(np.diff(xs))  # nothing overlaps


def test_of_a_long_text_the_middle_is_left_out_and_that_is_said():
    words = [Shaded(f"w{i}", "\n", [0.1], "content", False) for i in range(100)]
    lines, n = cut_lines(layout(words, len, 50))
    assert (len(lines), n) == (MOST_LINES + 1, 100 - MOST_LINES)
    assert lines[MOST_LINES // 2][0].word.text == "[76 words]" and lines[-1][0].word.text == "w99"
    figure = draw_words(text(long_text(2000)), "title", FONTS)
    assert "words in the middle are left out here, not in attention.json" in figure.texts[0].get_text()


def test_a_word_is_shaded_by_the_sum_of_its_tokens_and_the_scale_ends_with_the_heaviest():
    weights = [[0.6, 0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0], [0.2, 0, 0, 0, 0.3, 0.1, 0.4, 0, 0]]
    area = draw_words(text(sentence(), weights), "title", FONTS).axes[-1]
    drawn = [artist.get_text() for artist in area.texts]
    words = ["See", ":", "the", "swallowed", "card", ".", "belongs"]
    assert drawn == ["base", "<s> 60 %", *words, "adapter", "<s> 20 %", *words]
    shade = dict(zip(drawn[10:], (patch.get_facecolor() for patch in area.patches[8:]), strict=True))
    assert shade["swallowed"] == shade["card"] == pytest.approx((11 / 255, 79 / 255, 138 / 255, 1))  # 0.4 each, the darkest
    assert shade["."] == (1, 1, 1, 1)
    lines = {line.get_color() for line in area.lines}
    assert lines == {COLOURS[name] for name in ("bos", "prefix", "function", "content", "punctuation", "suffix")}


# ----------------------------------------------------------------------------------------------------- bars and heat maps


def test_long_texts_are_drawn_in_rows_of_bars():
    for n, rows in ((60, 1), (61, 2), (2000, 8)):
        figure = draw_bars(text(long_text(n)), "title", FONTS)
        labels = [tick.get_text() for axis in figure.axes for tick in axis.get_xticklabels()]
        assert len(figure.axes) == 2 * rows
        assert len(labels) == min(n, 480) and labels[0] == "<s>" and labels[-1] == ":"
        assert ("1,520 tokens in the middle, at the dashed line, are left out" in figure.get_suptitle()) == (n == 2000)
        marked = {number: line.get_xdata()[0] for number, axis in enumerate(figure.axes) for line in axis.lines}
        assert marked == ({8: -0.5, 9: -0.5} if n == 2000 else {})  # before the fifth of eight rows of 60
        plt.close(figure)


def test_a_bar_of_bos_does_not_hide_the_others():
    figure = draw_bars(text(sentence()[:3], [[0.96, 0.02, 0.02]], ("base",)), "title", FONTS)
    (panel,) = figure.axes
    assert panel.get_ylim()[1] == pytest.approx(0.022) and [note.get_text() for note in panel.texts] == ["96 %"]
    figure.draw_without_rendering()
    assert [label.get_text() for label in panel.get_yticklabels()][:3] == ["0 %", "0.25 %", "0.5 %"]


def test_the_picture_of_training_has_the_weights_of_the_softmax_over_all_tokens_but_no_bos():
    weights = [[0.6, 0.1, 0, 0.04, 0.02, 0.02, 0.02, 0, 0.2], [0.5, 0.2, 0, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]]
    panels = draw_text_training(text(sentence(), weights), "title", FONTS).axes
    assert [round(bar.get_height(), 4) for bar in panels[0].patches] == weights[0][1:]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    assert panels[0].get_title(loc="left") == "base: BOS, not drawn, has 60 %; of the rest the text has 25 %, its content words 15 %"
    assert "of the rest the text has 50 %, its content words 30 %" in panels[1].get_title(loc="left")


def test_of_many_sides_first_last_and_others_evenly_between_are_drawn():
    assert spread(["base", "adapter"], 5) == ["base", "adapter"]
    assert spread([str(i) for i in range(11)], 5) == ["0", "2", "5", "8", "10"]
    _, sides, what = pictures.kinds([str(i) for i in range(11)])["-training"]
    assert len(sides) == 5 and what.endswith("BOS is left out of the picture (5 of 11 sides)")


def test_layers_and_tokens_and_their_difference(tmp_path):
    seen = text_of(make_texts(tmp_path / "out", [sentence()], ("base", "adapter")), 0)
    figure = draw_text_layers(seen, "title", FONTS)
    base, adapter, less = (axis.images[0].get_array() for axis in figure.axes[1:4])
    np.testing.assert_allclose(base, seen.weights[0].mean(-1).T, rtol=1e-6)
    np.testing.assert_allclose(less, adapter - base, atol=1e-7)
    assert [tick.get_text() for tick in figure.axes[1].get_yticklabels()] == ["1", "2", "3"]
    cut = draw_text_layers(text(long_text(2000)), "title", FONTS)
    assert "1,880 tokens in the middle, at the dashed line" in cut.get_suptitle() and cut.axes[1].images[0].get_array().shape == (1, 120)
    assert [axis.lines[0].get_xdata()[0] for axis in cut.axes[1:4]] == [59.5] * 3 and not figure.axes[1].lines
    assert figure.axes[3].get_title(loc="left") == "adapter less base, in points"
    scales = [[tick.get_text() for tick in axis.get_yticklabels()] for axis in figure.axes[4:]]
    assert all("%" in mark for scale in scales[:2] for mark in scale) and not any("%" in mark for mark in scales[2])


def test_layers_are_numbered_at_a_distance():
    axis = plt.subplots()[1].yaxis
    for n in (1, 2, 5, 12, 13, 24, 28, 32, 36, 80):
        number_ticks(axis, n)
        numbers = [int(label.get_text()) for label in axis.get_ticklabels()]
        assert numbers[-1] == n and numbers[0] == 1 and len(numbers) <= 13
        assert min(np.diff(numbers), default=1) >= -(-n // 12) / 2 and (n > 12 or numbers == list(range(1, n + 1)))
        assert n < 13 or min(np.diff(numbers)) > 1


def test_heads_show_the_share_of_the_content_words(tmp_path):
    seen = text_of(make_texts(tmp_path / "out", [sentence()], ("base", "adapter")), 0)
    figure = draw_heads(seen, "title", FONTS)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), seen.weights[0, 4:7].sum(0), rtol=1e-6)
    less = seen.weights[1, 4:7].sum(0) - seen.weights[0, 4:7].sum(0)
    np.testing.assert_allclose(figure.axes[2].images[0].get_array(), less, rtol=1e-5)
    without = draw_heads(text([token for token in sentence() if token["category"] != "content"]), "title", FONTS)
    assert "share of the text in the attention of each head" in without.get_suptitle()


# ----------------------------------------------------------------------------------------------------------------- fonts


def test_characters_that_the_font_lacks_come_from_another_or_become_codes(monkeypatch):
    (default,) = [f for f in font_manager.fontManager.ttflist if f.fname.endswith("matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf")]
    (other,) = [f for f in font_manager.fontManager.ttflist if f.fname.endswith("matplotlib/mpl-data/fonts/ttf/STIXGeneral.ttf")]
    charmaps = [set(font_manager.get_font(font.fname).get_charmap()) for font in (default, other)]
    elsewhere, nowhere = chr(min(charmaps[1] - charmaps[0])), "犬"
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [default, other])
    assert choose_fonts("a") == (["DejaVu Sans"], set())
    fonts = choose_fonts(f"a{elsewhere}{nowhere}\n")
    assert fonts == (["DejaVu Sans", "STIXGeneral"], {nowhere})
    assert [fonts.label(piece) for piece in (" cat", " ", "", "犬", "a\nb")] == ["cat", "␣", "·", "\\u72ac", "a\\nb"]


def test_percent():
    shares = (0.314, 0.0421, 0.0008, 0.00001, 0, 1, 0.0996, -0.05, -0.000001)
    assert [percent(share) for share in shares] == ["31 %", "4.2 %", "0.08 %", "0 %", "0 %", "100 %", "10 %", "−5.0 %", "0 %"]


# --------------------------------------------------------------------------------------------------------------- folders


def test_texts_of_any_kind_are_drawn_without_a_box_and_again_with_the_same_bytes(tmp_path, capsys, monkeypatch):
    make_texts(tmp_path / "out", [hostile()])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a glyph that is missing, a layout that collapses
        assert pictures.draw_texts(tmp_path / "out", 8) == 1
    assert capsys.readouterr().err.count("they are drawn as codes") <= 1
    kinds = ("", "-bars", "-heads", "-layers", "-training")
    names = [f"text-001{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")]
    files = {path.name: path for path in (tmp_path / "out").iterdir() if path.name.startswith("text")}
    assert sorted(files) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml") for path in files.values())
    before, drawn = files["text-001.svg"].read_bytes(), pictures.kinds
    monkeypatch.setattr(pictures, "kinds", lambda sides: {"": drawn(sides)[""]})
    pictures.draw_texts(tmp_path / "out")
    assert files["text-001.svg"].read_bytes() == before


def test_as_many_texts_are_drawn_as_wanted(tmp_path):
    make_texts(tmp_path / "out", [sentence()] * 2, ("base",), n_layers=1, n_heads=1)
    assert pictures.draw_texts(tmp_path / "out", 0) == 0 and pictures.draw_texts(tmp_path / "out", 1) == 1
    assert not (tmp_path / "out" / "text-002.png").exists()


def test_a_corpus_is_drawn(tmp_path):
    make_corpus(tmp_path / "out")
    assert pictures.draw_corpus(tmp_path / "out") == 5
    names = ["differences", "differences-by-layer", "shares-heads", "shares-layers", "shares-training"]
    for kind in ("png", "svg"):
        assert sorted(path.stem for path in (tmp_path / "out").glob(f"*.{kind}")) == names


def test_a_corpus_of_an_untuned_model_has_no_differences(tmp_path):
    make_corpus(tmp_path / "out", ("base",), seeds=0)
    assert pictures.draw_corpus(tmp_path / "out") == 3


def test_curves_have_the_stored_means_and_a_thin_line_a_run(tmp_path):
    stored = make_corpus(tmp_path / "out")
    corpus = corpus_of(stored)
    assert corpus.sides == list(SIDES) and corpus.categories(True) == ["bos", "prefix", "suffix", "content", "function", "punctuation"]
    panels = draw_training(corpus, "title").axes
    assert [panel.get_title(loc="left") for panel in panels] == [
        *("layer 3 (the last), all tokens", "layer 3 (the last), without BOS"),
        *("mean over layers, all tokens", "mean over layers, without BOS"),
    ]
    bos, thin, second, prefix = panels[0].lines[:4]
    expected = [100 * corpus.shares[side, 3, "bos", True]["mean"] for side in SIDES]
    np.testing.assert_allclose(bos.get_ydata(), expected)
    np.testing.assert_allclose(np.mean([thin.get_ydata(), second.get_ydata()], 0), expected, rtol=1e-5)
    assert prefix.get_color() == COLOURS["prefix"] and panels[1].lines[0].get_color() == COLOURS["prefix"]


def test_differences_have_their_intervals_beside_them(tmp_path):
    corpus = corpus_of(make_corpus(tmp_path / "out"))
    all_tokens, without = draw_differences(corpus, "title").axes
    row = corpus.differences[3, "bos", True]
    first = f"{100 * row['mean']:+.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})".replace("-", "−")
    assert all_tokens.texts[0].get_text() == first
    assert len(all_tokens.texts) == 12 and len(without.texts) == 10  # two for each category, BOS left out on the right


def test_layers_and_categories_of_a_corpus(tmp_path):
    corpus = corpus_of(make_corpus(tmp_path / "out"))
    panels = draw_layers(corpus, "title").axes
    assert [panel.images[0].get_array().shape for panel in panels] == [(3, 6)] * 3 + [(3, 5)] * 3
    assert panels[4].images[0].get_array()[0, 2] == pytest.approx(corpus.shares["adapter", 1, "content", False]["mean"])


def test_heads_of_a_corpus_are_no_mean_over_heads(tmp_path):
    title = "texts\nattention of the last token: softmax over all tokens of the sequence, mean over heads"
    figure = draw_corpus_heads(corpus_of(make_corpus(tmp_path / "out")), title)
    assert "share of the content words in the attention of each head" in figure.get_suptitle()
    assert "mean over heads" not in figure.get_suptitle()


def test_a_damaged_folder_is_refused(tmp_path):
    make_texts(tmp_path / "out", [sentence()])
    (tmp_path / "out" / "attention.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"attention\.npz is damaged"):
        pictures.draw_texts(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["attention.json", "attention.npz"]


# ---------------------------------------------------------------------------------------------------------------- redraw


def run(*flags) -> None:
    attention.main(attention.build_parser().parse_args([str(flag) for flag in flags]))


def test_redraw_makes_pictures_and_page_again(tmp_path, capsys):
    make_texts(tmp_path / "out", [sentence()] * 2, ("base",), n_layers=1, n_heads=1)
    run("--redraw", tmp_path / "out", "--pictures", 1)
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: pictures of 1 text and page.html\n"
    assert {"text-001.png", "text-001.svg", "page.html"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_redraw_refuses_what_it_cannot_draw(tmp_path):
    for flags, message in (
        (("--redraw", tmp_path), "holds neither attention.json nor shares.json: name a folder that attention.py wrote"),
        (("--redraw", tmp_path / "nothing"), "holds neither"),
        (("--redraw", tmp_path, "--model", "tiny", "--out", "a"), "--redraw draws what its folder holds: leave out --model, --out"),
        (("--redraw", tmp_path, "--also", "rollout", "--v-measure", "--mask-layers", 1, 2), "leave out --also, --v-measure, --mask-layers"),
    ):
        with pytest.raises(InputError, match=message):
            run(*flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_redraw_needs_no_model(tmp_path):
    make_texts(tmp_path / "texts", [sentence()])
    make_corpus(tmp_path / "corpus")
    program = "import sys; sys.modules.update(torch=None, transformers=None, peft=None); import attention; "
    program += "attention.main(attention.build_parser().parse_args(sys.argv[1:]))"
    for name in ("texts", "corpus"):
        command = [sys.executable, "-c", program, "--redraw", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.endswith("and page.html\n"), done.stderr
