"""Does a prompt that names a facet of a text make the vectors follow it? Two public labelled sets, before and after training.

    python bench/bench_facets.py --hwu64 hwu64.jsonl.gz --clinc150 clinc150.jsonl.gz --general runs/general --out results/facets

--hwu64, --clinc150    JSONL with the fields text, label and domain
--general              a finished run with position-mean, to stand beside the untuned model

Of HWU64 the intents are taken whose object is asked about in several ways, and whose action has several objects (CROSSED): object and
action do not nest in each other, while intents nest in both. Of CLINC150 1,000 rows are taken, with intent and domain, which nest.

One half of the HWU64 texts, without their labels, is the corpus of two runs, the other half scores. What two texts share is guessed from
words that a user could write down (ACTIONS, OBJECTS): weak supervision by labelling functions (Ratner et al. 2017, arXiv 1711.10160).

    mixed      pairs of one action, of one object and of both, each under the prompt of its facet
    control    the same pairs, all under the prompt `cluster`
    words      the word lists themselves as clusters of the texts that score: what was there to learn; printed

Each is trained with the poolings position-mean and last. evaluate.py --facets scores all models of a pooling under all prompts; results
in OUT/hwu64-POOLING.json and OUT/clinc150-POOLING.json. What is there is not made again: an interrupted call can be repeated.
"""

import argparse
import csv
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files.console import say
from files.reading import read_rows
from files.writing import write_text

ROOT, N_ROWS, STEPS, PAIRS_OF_A_TEXT = Path(__file__).resolve().parent.parent, 1000, 125, 3
PROMPTS = {facet: f'The {facet} of "{{text}}" is:' for facet in ("intent", "object", "action")}
OF_CLINC150 = {"intent": PROMPTS["intent"], "domain": PROMPTS["object"]}
POOLINGS = ("position-mean", "last")
CROSSED = {  # intent of HWU64 -> object, action
    **{f"{name}_{action}": (name, action) for name in ("alarm", "calendar") for action in ("query", "set", "remove")},
    "lists_query": ("lists", "query"),
    "lists_createoradd": ("lists", "set"),
    "lists_remove": ("lists", "remove"),
    "email_querycontact": ("contacts", "query"),
    "email_addcontact": ("contacts", "set"),
    "email_query": ("email", "query"),
    "email_sendemail": ("email", "send"),
    "social_query": ("social", "query"),
    "social_post": ("social", "send"),
    "takeaway_query": ("takeaway", "query"),
    "takeaway_order": ("takeaway", "order"),
    "transport_query": ("transport", "query"),
    "transport_traffic": ("transport", "query"),
    "transport_ticket": ("transport", "order"),
    "transport_taxi": ("transport", "order"),
    "iot_hue_lighton": ("light", "on"),
    "iot_hue_lightoff": ("light", "off"),
    "iot_hue_lightup": ("light", "up"),
    "iot_hue_lightdim": ("light", "down"),
    "iot_wemo_on": ("plug", "on"),
    "iot_wemo_off": ("plug", "off"),
    "audio_volume_up": ("volume", "up"),
    "audio_volume_down": ("volume", "down"),
    "audio_volume_mute": ("volume", "off"),
}
ACTIONS = {  # the first that matches counts
    "off": r"\b(turn|switch|shut)\b.*\boff\b|\boff\b.*\b(plug|socket|lights?)\b|\b(mute|muted|silent|silence)\b",
    "on": r"\b(turn|switch|put|start)\b.*\bon\b",
    "down": r"\b(down|lower|dim|decrease|reduce|quieter|softer|darker)\b",
    "up": r"\b(up|louder|brighter|brighten|increase|raise|more)\b.*\b(lights?|volume|brightness|sound)\b|\b(louder|brighter|brighten)\b",
    "remove": r"\b(remove|delete|cancel|clear|erase|get rid)\b",
    "send": r"\b(send|post|tweet|reply|respond|share|upload)\b",
    "order": r"\b(order|book|buy|call|get)\b",
    "set": r"\b(set|add|create|make|new|remind|schedule|save|put)\b",
    "query": r"\b(what|what's|whats|when|which|who|how|where|is|are|do|does|did|show|tell|check|any)\b",
}
OBJECTS = {
    "alarm": r"\b(alarms?|wake)\b",
    "lists": r"\blists?\b",
    "contacts": r"\b(contacts?|address book|phone number)\b",
    "email": r"\b(e?mails?|inbox)\b",
    "social": r"\b(facebook|twitter|tweets?|instagram|social|status)\b",
    "takeaway": r"\b(take ?(away|out)|deliver\w*|pizza|food|restaurant)\b",
    "transport": r"\b(trains?|taxi|uber|cab|tickets?|traffic|directions?)\b",
    "plug": r"\b(plug|socket|wemo)\b",
    "light": r"\b(lights?|lamp|bright\w*|dark\w*)\b",
    "volume": r"\b(volume|sound|louder|speakers?|mute|quiet)\b",
    "calendar": r"\b(calendar|meetings?|events?|appointments?|schedule|reminders?)\b",
}


def rows_of(path: Path) -> list[dict]:
    """All rows in a fixed random order."""
    rows = [row for _, row in read_rows(path)]
    random.Random(0).shuffle(rows)
    return rows


def crossed(rows: list[dict]) -> list[dict]:
    """The rows of HWU64 whose object and action cross, with columns text, intent, object and action."""
    kept = [(row, CROSSED[row["label"]]) for row in rows if row["label"] in CROSSED]
    return [{"text": row["text"], "intent": row["label"], "object": thing, "action": action} for row, (thing, action) in kept]


def guess(text: str, patterns: dict[str, str]) -> str | None:
    return next((name for name, pattern in patterns.items() if re.search(pattern, text.lower())), None)


def guesses(texts: list[str]) -> dict[str, list[str | None]]:
    """What the word lists say of each facet of each text; None where no word is known."""
    guessed = {"action": [guess(text, ACTIONS) for text in texts], "object": [guess(text, OBJECTS) for text in texts]}
    return guessed | {"intent": [a and o and f"{a} {o}" for a, o in zip(*guessed.values(), strict=True)]}


def facet_pairs(texts: list[str]) -> list[dict]:
    """Pairs of texts that share a facet as the word lists guess it, under the prompt of the facet. No label is read."""
    pairs, rng = [], random.Random(0)
    for facet, values in guesses(texts).items():
        of_value = {value: [i for i, other in enumerate(values) if other == value] for value in set(values) - {None}}
        for i, value in enumerate(values):
            others = [j for j in of_value.get(value, ()) if j != i]
            for j in rng.sample(others, min(PAIRS_OF_A_TEXT, len(others))):
                pairs.append({"anchor": texts[i], "positive": texts[j], "prompt": PROMPTS[facet]})
    return pairs


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_data(args: argparse.Namespace) -> None:
    """hwu64.csv (the half that is not trained on), clinc150.csv, mixed.jsonl and control.jsonl."""
    rows = crossed(rows_of(args.hwu64))
    learned, unseen = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    write_csv(args.out / "hwu64.csv", unseen)
    clinc150 = [{"text": row["text"], "intent": row["label"], "domain": row["domain"]} for row in rows_of(args.clinc150)[:N_ROWS]]
    write_csv(args.out / "clinc150.csv", clinc150)
    pairs = facet_pairs([row["text"] for row in learned])
    write_text(args.out / "mixed.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    write_text(args.out / "control.jsonl", "".join(json.dumps(pair | {"prompt": None}) + "\n" for pair in pairs))
    say(f"{len(learned)} texts to learn from, {len(pairs)} pairs, {len(unseen)} and {len(clinc150)} texts to score")


def score_words(path: Path) -> None:
    """Print the V-measure of the word lists' guesses; those without a known word are one cluster, of intents by half."""
    from sklearn.metrics import v_measure_score

    rows = [row for _, row in read_rows(path)]
    guessed = guesses([row["text"] for row in rows])
    guessed["intent"] = list(zip(guessed["action"], guessed["object"], strict=True))
    for facet, values in guessed.items():
        say(f"words, {facet}: V-measure {100 * v_measure_score([row[facet] for row in rows], list(map(str, values))):.1f}")


def call(script: str, *flags) -> None:
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True)


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "control.jsonl").exists():
        write_data(args)
    score_words(args.out / "hwu64.csv")
    for pooling in POOLINGS:
        pooled, runs = ["--pooling", pooling, "--scope", "all"], [args.out / f"{kind}-{pooling}" for kind in ("mixed", "control")]
        for run, kind in zip(runs, ("mixed", "control"), strict=True):
            call("train.py", "--pairs", args.out / f"{kind}.jsonl", "--out", run, *pooled, "--steps", STEPS, "--hold-out", 0, "--resume")
        models = ["tiny", *([args.general] if pooling == "position-mean" else []), *runs]
        for name, prompts in (("hwu64", PROMPTS), ("clinc150", OF_CLINC150)):
            results = args.out / f"{name}-{pooling}.json"
            if not results.exists():
                facets = ["--facets", *(f"{facet}={prompt}" for facet, prompt in prompts.items()), "--prompt", "cluster"]
                flags = ["--model", *models, *pooled, "--override-contract", "--out", results]
                call("evaluate.py", "--data", args.out / f"{name}.csv", *facets, *flags)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag in ("--hwu64", "--clinc150", "--general", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    main(parser.parse_args())
