"""What an engine and the gate made of the texts: counts, reasons, histograms, and samples to read."""

import random
from collections import Counter
from typing import IO

from files.console import say
from files.reading import excerpt
from pair_engines.gate import LENGTH_RATIO, REASONS, Verdict

SAMPLES = 20  # accepted pairs in the report
PICTURE_FROM = 1000  # pairs below which no histogram is drawn: matplotlib alone takes longer than they do
# measure -> edges of its bins; what lies outside is counted in the first or last
EDGES = {
    "edit similarity": [i / 20 for i in range(21)],
    "length ratio": [0, *(LENGTH_RATIO ** (i / 8) for i in range(-8, 9)), float("inf")],
    "cosine": [i / 20 for i in range(-20, 21)],
}


class Tally:
    """Counts the gate's verdicts, and keeps a random sample of them, in constant memory.

    n_samples     accepted and rejected pairs to keep
    """

    def __init__(self, seed: int, n_samples: int):
        self.made_by, self.kept_by = Counter(), Counter()  # pairs by (engine, template), the latter "" where there is none
        self.reasons, self.failed = Counter(), 0
        self.histograms = {name: {which: [0] * (len(edges) - 1) for which in ("kept", "left out")} for name, edges in EDGES.items()}
        self.accepted, self.rejected = Sample(seed, max(n_samples, SAMPLES)), Sample(seed, n_samples)

    def add(self, verdict: Verdict) -> None:
        by = verdict.pair.get("engine", ""), verdict.pair.get("template", "")
        self.made_by[by] += 1
        self.kept_by[by] += verdict.reason is None
        if verdict.reason:
            self.reasons[verdict.reason] += 1
        for name, value in verdict.measures.items():
            edges = EDGES[name]
            place = sum(value >= edge for edge in edges[1:-1])
            self.histograms[name]["left out" if verdict.reason else "kept"][place] += 1
        (self.rejected if verdict.reason else self.accepted).add(verdict)

    @property
    def made(self) -> int:
        return self.made_by.total()

    @property
    def kept(self) -> int:
        return self.kept_by.total()

    def reason_line(self) -> str:
        """The one line of what the gate left out: "gate: 3 of 9 pairs left out: 2 empty, 1 refused by the model"."""
        if not self.reasons:
            return f"gate: all {self.made} pairs kept"
        counts = ", ".join(f"{count} {REASONS[reason]}" for reason, count in self.reasons.most_common())
        return f"gate: {self.reasons.total()} of {self.made} pairs left out: {counts}"

    def show(self, n: int) -> None:
        """Print n accepted and n rejected pairs, each of these with its reason."""
        for title, sample in (("accepted", self.accepted), ("rejected", self.rejected)):
            chosen = sample.verdicts()[:n]
            say(f"{title}: {len(chosen)} of {sample.seen}, drawn at random")
            for verdict in chosen:
                why = f"  [{REASONS[verdict.reason]}]" if verdict.reason else ""
                say(f"  {excerpt(verdict.pair['anchor'], 120)!r}\n  {excerpt(verdict.pair['positive'], 120)!r}{why}")

    def as_json(self, settings: dict) -> dict:
        """Everything as the value of the report's JSON file; bins are named by their edges."""
        taken = [name for name, counts in self.histograms.items() if any(map(sum, counts.values()))]
        pairs = [verdict.pair for verdict in self.accepted.verdicts()[:SAMPLES]]
        return {
            "arguments": settings,
            "made": self.made,
            "kept": self.kept,
            "failed": self.failed,
            "engines": self._yields(0),
            "templates": self._yields(1),
            "left_out": {REASONS[reason]: count for reason, count in self.reasons.most_common()},
            "histograms": {name: {"edges": [str(round(e, 3)) for e in EDGES[name]], **self.histograms[name]} for name in taken},
            "pairs": [{name: pair[name] for name in ("anchor", "positive", "source", "template") if name in pair} for pair in pairs],
        }

    def _yields(self, part: int) -> dict[str, dict[str, int]]:
        """Name -> pairs made and kept, of each engine (part 0) or template (1)."""
        yields = {}
        for by, made in sorted(self.made_by.items()):
            if by[part]:
                counts = yields.setdefault(by[part], {"made": 0, "kept": 0})
                counts["made"] += made
                counts["kept"] += self.kept_by[by]
        return yields

    def draw(self, file: IO[bytes]) -> None:
        """Write the histograms as a PNG file."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        taken = [name for name, counts in self.histograms.items() if any(map(sum, counts.values()))]
        figure, axes = plt.subplots(1, len(taken), figsize=(4.5 * len(taken), 3.2), squeeze=False, layout="constrained")
        for ax, name in zip(axes[0], taken, strict=True):
            places, below = range(len(EDGES[name]) - 1), [0] * (len(EDGES[name]) - 1)
            for which, colour in (("kept", "tab:blue"), ("left out", "tab:orange")):
                ax.bar(places, self.histograms[name][which], width=0.9, bottom=below, color=colour, label=which)
                below = self.histograms[name][which]
            step = max(1, len(places) // 6)
            ax.set_xticks(places[::step], [f"{EDGES[name][i]:.2g}" for i in places[::step]])
            ax.set(xlabel=f"{name} of a pair, from", ylabel="pairs")
        axes[0, 0].legend()
        figure.savefig(file, format="png", dpi=120)
        plt.close(figure)


class Sample:
    """A random sample of verdicts that come one at a time (reservoir sampling)."""

    def __init__(self, seed: int, size: int):
        self.random, self.size, self.seen, self.kept = random.Random(seed), size, 0, []

    def add(self, verdict: Verdict) -> None:
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(verdict)
        elif (place := self.random.randrange(self.seen)) < self.size:
            self.kept[place] = verdict

    def verdicts(self) -> list[Verdict]:
        return random.Random(0).sample(self.kept, len(self.kept))
