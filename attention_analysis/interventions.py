"""What a vector loses where its last token may not attend to some of the tokens: the difference in V-measure on labelled texts.

A share of attention says where the last token looks; whether that matters shows only when it is kept from looking there. A category of
tokens (BOS, the prompt's prefix or suffix, content words, function words, punctuation) is hidden from it in some layers, all texts are
embedded and clustered again, and the scores are compared on the same texts (`evaluation/differences.py`).

Hiding any tokens may hurt, since the model was not trained so. As a control as many others are hidden: for words of the text as many tokens
drawn at random from the text (from all of it, so that many are the same where the category is most of the text), for BOS and parts of the
prompt as many other tokens of the prompt, the same in every text. Random tokens of the whole sequence would be no fair control: what is
hidden of the prompt then differs from text to text, which moves every vector another way and costs more than hiding any category does.
The difference between a category and its control says whether it matters that it was these tokens.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attention_analysis.categories import Categories
from attention_analysis.sides import reads_last_token
from attention_analysis.stored import CATEGORIES, HIDEABLE
from encoder.attention_masks import Hides, hiding
from evaluation.differences import Difference, aligned, difference, show
from evaluation.evidence import Evidence, of_clustering
from files.console import InputError

if TYPE_CHECKING:
    from encoder import Encoder

OF_TEXT, OF_PROMPT = ("content", "function", "punctuation"), ("prefix", "suffix")
CONTROL_SEED = 0


class Cost(NamedTuple):
    """What hiding a category of tokens costs one model on one labelled set. Scores are in 0..1."""

    category: str
    n_hidden: float  # tokens hidden of a text, mean
    less_all: Difference  # vectors with the category hidden, less those with nothing hidden
    control: Difference  # as many others hidden, less nothing hidden
    less_control: Difference  # the category hidden, less as many others


def hidden_tokens(categories: Sequence[str], category: str, number: int | None = None) -> np.ndarray:
    """Which of a sequence's tokens (n,) are hidden: those of a category, or with the `number` of a text its control. Never the last."""
    of_category = np.array([name == category for name in categories], bool)
    of_category[-1:] = False
    if number is None:
        return of_category
    in_text = category in OF_TEXT
    others = [i for i, name in enumerate(categories[:-1]) if name in (OF_TEXT if in_text else {*OF_PROMPT} - {category})]
    rng = np.random.default_rng([CONTROL_SEED, CATEGORIES.index(category), number if in_text else 0])
    chosen = np.zeros(len(categories), bool)
    chosen[rng.permutation(others)[: of_category.sum()].astype(int)] = True
    return chosen


def hides(
    encoder: "Encoder", texts: list[str], categories: list[list[str]], category: str, role: str = "document", *, control: bool = False
) -> tuple[Hides, float]:
    """What `hiding` is to hide of these texts, and how many tokens of a text that are, mean.

    categories    of every token of every text's sequence, as `Encoder.tokenize` has it
    control       the control's tokens instead; the same for every model, as the draw depends on the number of the text alone
    """
    tokenized, by_sequence, total = encoder.tokenize(texts, role), {}, 0
    for i, (ids, span) in enumerate(zip(tokenized.ids, tokenized.spans, strict=True)):
        chosen = by_sequence.setdefault((tuple(ids), tuple(span)), hidden_tokens(categories[i], category, i if control else None))
        total += int(chosen.sum())
    return lambda ids, span: by_sequence[tuple(ids), span], total / max(1, len(texts))


def names_of_tokens(encoder: "Encoder", texts: list[str], categories: Categories, role: str = "document") -> list[list[str]]:
    """The category of every token of every text in its prompt, by name."""
    tokenized = encoder.tokenize(texts, role)
    parts = (encoder.prompt_tokenizer.parts(len(ids), span) for ids, span in zip(tokenized.ids, tokenized.spans, strict=True))
    return [[CATEGORIES[number] for number in categories.of_sequence(i, of_text)] for i, of_text in enumerate(parts)]


def check_intervention(encoder: "Encoder", names: Iterable[str], role: str = "document") -> None:
    """Raise InputError for a category that cannot be hidden, under several prompts, and for a vector that is not the last token's."""
    for name in names:
        if name not in HIDEABLE:
            raise InputError(f"--mask {name}: take one or more of {', '.join(HIDEABLE)}")
    if len(encoder.contract.prompts_of(role)) > 1:
        raise InputError("--mask: under several prompts a text has several last tokens, take one prompt")
    if not reads_last_token(encoder.contract):
        ways = f"pooling {encoder.contract.pooling}, scope {encoder.contract.scope}"
        raise InputError(f"--mask hides tokens from the sequence's last, but {ways} reads others: take one of pooling last, scope all")


def costs(
    encoder: "Encoder",
    texts: list[str],
    labels: Sequence,
    categories: list[list[str]],
    names: Iterable[str],
    layers: Iterable[int] | None = None,
    role: str = "document",
) -> list[Cost]:
    """What hiding each category costs on N labelled texts, in V-measure.

    categories    of every token of every text, see `hides`
    layers        in which the tokens are hidden, from 0 (default: all)
    """
    check_intervention(encoder, names := list(names), role)
    whole, rows = evidence_of(encoder, texts, labels, role), []
    for name in names:
        hide, n_hidden = hides(encoder, texts, categories, name, role)
        hide_others, _ = hides(encoder, texts, categories, name, role, control=True)
        without, others = (evidence_of(hiding(encoder, some, layers), texts, labels, role) for some in (hide, hide_others))
        rows.append(Cost(name, n_hidden, difference(without, whole), difference(others, whole), difference(without, others)))
    return rows


def evidence_of(encoder: "Encoder", texts: list[str], labels: Sequence, role: str = "document") -> Evidence:
    """The clustering scores of a model's vectors, with what their differences' intervals need."""
    return of_clustering(encoder.encode(texts, role), np.asarray(labels), rows=f"{len(texts)} texts")


def lines(title: str, costs: list[Cost]) -> list[str]:
    """The table of one model and one set: V-measure x 100, 95 % intervals on the same texts."""
    head = [title, "tokens a text", "less nothing hidden", "as many others hidden", "less as many others"]
    rows = [[cost.category, f"{cost.n_hidden:.1f}", *(show(d) for d in (cost.less_all, cost.control, cost.less_control))] for cost in costs]
    return aligned([head, *rows])


FIELDS = ("less_all", "control", "less_control")


def as_json(costs: list[Cost]) -> list[dict]:
    def of(d: Difference) -> dict:
        return {"difference": d.value, "interval": [d.low, d.high], "sd_rows": d.rows, "sd_algorithm": d.algorithm, "verdict": d.verdict}

    return [{"category": c.category, "n_hidden": c.n_hidden} | {name: of(getattr(c, name)) for name in FIELDS} for c in costs]


def from_json(rows: list[dict]) -> list[Cost]:
    """What `as_json` was given."""

    def of(d: dict) -> Difference:
        return Difference(d["difference"], *d["interval"], d["sd_rows"], d["sd_algorithm"])

    return [Cost(c["category"], c["n_hidden"], *(of(c[name]) for name in FIELDS)) for c in rows]
