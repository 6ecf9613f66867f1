"""What pictures and the page take of the stored files: one text with its weights, a corpus with its shares."""

from typing import NamedTuple

import numpy as np

from attention_analysis.drawing import present
from attention_analysis.stored import OF_TEXT, StoredCorpus, StoredTexts, without_bos

Shares = dict[str, dict[str, float]]  # category: side: share


class Text(NamedTuple):
    """S sides, T tokens, L layers, H heads."""

    tokens: list[dict]
    sides: list[str]
    weights: np.ndarray  # (S, T, L, H)

    @property
    def categories(self) -> list[str]:
        return [token["category"] for token in self.tokens]

    def last_layer(self) -> np.ndarray:
        """(S, T): weights of the last layer, mean over heads."""
        return self.weights[:, :, -1].mean(-1)

    def without_bos(self) -> np.ndarray:
        """(S, T): `last_layer` with BOS at 0 and the others divided by their sum."""
        others = np.where(np.array(self.categories) == "bos", 0, self.last_layer())
        total = others.sum(1, keepdims=True)
        return np.divide(others, total, out=np.zeros_like(others), where=total > 0)

    def shares(self, weights: np.ndarray) -> Shares:
        """Sums over the categories of weights (S, T)."""
        own = np.array(self.categories)
        sums = {category: weights[:, own == category].sum(1).tolist() for category in present(own)}
        return {category: dict(zip(self.sides, values, strict=True)) for category, values in sums.items()}

    def of_sides(self, sides: list[str]) -> "Text":
        """The same text, at these sides alone."""
        return self._replace(sides=sides, weights=self.weights[[self.sides.index(side) for side in sides]])


def text_of(stored: StoredTexts, number: int) -> Text:
    """The text of this number, from 0, at all its sides."""
    start, stop = stored.starts[number : number + 2]
    sides = [side["name"] for side in stored.about["sides"]]
    return Text(stored.about["texts"][number]["tokens"], sides, stored.weights[:, start:stop])


def ends(sides: list[str]) -> list[str]:
    """The first and the last side: base and adapter."""
    return list(dict.fromkeys([sides[0], sides[-1]]))


def spread(sides: list[str], most: int) -> list[str]:
    """At most so many sides: the first, the last, and others evenly between them."""
    places = np.linspace(0, len(sides) - 1, min(most, len(sides))).round().astype(int)
    return [sides[place] for place in dict.fromkeys(places.tolist())]


Key = tuple[int | str, str, bool]  # layer or "all", category, whether BOS counts


class Corpus(NamedTuple):
    """Shares of a corpus: sides in order of training, rows of shares.json by what they are of."""

    sides: list[str]
    n_layers: int
    shares: dict[tuple[str, int | str, str, bool], dict]  # by side and Key
    differences: dict[Key, dict]  # the last side less the first
    stored: StoredCorpus

    @property
    def ends(self) -> tuple[str, str]:
        return self.sides[0], self.sides[-1]

    def categories(self, bos: bool) -> list[str]:
        """Those that any text has; without BOS all but that."""
        names = self.stored.about["categories"]
        has = self.stored.by_layer.any((0, 1, 2))
        return present(name for name, there in zip(names, has, strict=True) if there and (bos or name != "bos"))

    def kinds(self, bos: bool) -> list[str]:
        """The categories, and "text" for all of the text's own tokens."""
        own = (self.sides[0], self.n_layers, "text", bos) in self.shares
        return [*self.categories(bos), *["text"] * own]

    def layer_name(self, layer: int | str) -> str:
        return "mean over layers" if layer == "all" else f"layer {layer}" + " (the last)" * (layer == self.n_layers)

    def grid(self, side: str, bos: bool, categories: list[str]) -> np.ndarray:
        """(L, C): mean shares of every layer."""
        layers = range(1, self.n_layers + 1)
        return np.array([[self.shares[side, layer, category, bos]["mean"] for category in categories] for layer in layers])

    def heads(self, side: str, category: str) -> np.ndarray:
        """(L, H): mean share of a category in every head, over the runs that have the side."""
        column = self.stored.about["categories"].index(category)
        rows = [i for i, model in enumerate(self.stored.about["models"]) if model["side"] == side]
        return self.stored.by_head[rows, :, :, column].mean(0)

    def runs(self, layer: int | str, bos: bool, category: str) -> list[tuple[list[int], list[float]]]:
        """For each of several runs the numbers of its sides and its mean shares in percent; the base belongs to all."""
        models = self.stored.about["models"]
        names = list(dict.fromkeys(model["run"] for model in models if model["run"] is not None))
        if len(names) < 2:
            return []
        categories = self.stored.about["categories"]
        columns = [categories.index(name) for name in (OF_TEXT if category == "text" else (category,))]
        curves = []
        for name in names:
            rows = {model["side"]: i for i, model in enumerate(models) if model["run"] in (None, name)}
            at = [i for i, side in enumerate(self.sides) if side in rows]
            values = self.stored.by_layer[[rows[self.sides[i]] for i in at]]  # (sides, N, L, C)
            if not bos:
                values = without_bos(values, categories)
            values = values.mean(2) if layer == "all" else values[:, :, layer - 1]
            curves.append((at, (100 * values[..., columns].sum(2).mean(1)).tolist()))
        return curves


def corpus_of(stored: StoredCorpus) -> Corpus:
    """Sides in order of training: base, steps, adapter."""
    about = stored.about
    steps = {model["side"]: (model["side"] == "adapter", model.get("step") or 0) for model in reversed(about["models"])}
    sides = sorted(steps, key=lambda side: (side != "base", *steps[side]))
    shares = {(row["side"], row["layer"], row["category"], row["bos"]): row for row in about["shares"]}
    differences = {
        (row["layer"], row["category"], row["bos"]): row
        for row in about["differences"]
        if (row["side"], row.get("less")) == (sides[-1], sides[0])
    }
    return Corpus(sides, about["layers"], shares, differences, stored)
