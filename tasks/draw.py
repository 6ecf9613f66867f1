"""Draw the bundled clustering tasks from the first sentences of docstrings.

    python -m tasks.draw --out FOLDER

The bundled tasks were drawn once, before anything was tuned, and are frozen. This script shows how: run again, it draws from
the packages that are installed now, and gives other sentences.

Leaves behind, in --out, two gzipped JSONL files with a sentence a line, {"text": str, "label": str, "module": str}:

    docstrings-by-module.jsonl.gz      labelled by module: 40 sentences each of 24 modules, at most two modules of a package
    docstrings-by-package.jsonl.gz     labelled by package: 60 sentences each, of other modules than the first task's
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

from files.console import run_script, say
from files.docstrings import DocstringText, normalized_key, read_library
from files.writing import check_absent, write_new

BY_MODULE, BY_PACKAGE = "docstrings-by-module", "docstrings-by-package"
NOT_DRAWN = {"narwhals", "multiprocess", "distutils", "hypothesis"}  # copies of other packages, or not a requirement
MODULES, MODULE_SENTENCES, MODULES_PER_PACKAGE = 24, 40, 2
PACKAGE_SENTENCES, SENTENCES_PER_MODULE = 60, 10

Row = tuple[str, str, str]  # text, label, module


def unique_sentences(texts: list[DocstringText]) -> dict[str, list[str]]:
    """Module -> its first sentences of 5 to 40 words that occur in no other module; modules sorted by name."""
    sentences, modules_with = defaultdict(list), defaultdict(set)
    for module, sentence, _ in texts:
        if 5 <= len(sentence.split()) <= 40:
            modules_with[normalized_key(sentence)].add(module)
            if sentence not in sentences[module]:
                sentences[module].append(sentence)
    return {module: [s for s in sentences[module] if len(modules_with[normalized_key(s)]) == 1] for module in sorted(sentences)}


def draw_tasks(texts: list[DocstringText], rng: random.Random) -> dict[str, list[Row]]:
    """Name of a task -> its rows (text, label, module)."""
    sentences = unique_sentences(texts)
    packages = defaultdict(list)
    for module in sentences:
        package = module.split(".")[0]
        if not package.startswith("_") and package not in NOT_DRAWN:
            packages[package].append(module)

    chosen, chosen_of_package = [], Counter()
    for module in rng.sample(sorted(sentences), len(sentences)):
        package = module.split(".")[0]
        large_enough = len(sentences[module]) >= MODULE_SENTENCES and len(packages.get(package, ())) > 4
        if large_enough and chosen_of_package[package] < MODULES_PER_PACKAGE and len(chosen) < MODULES:
            chosen_of_package[package] += 1
            chosen.append(module)
    by_module = [(sentence, module, module) for module in chosen for sentence in rng.sample(sentences[module], MODULE_SENTENCES)]

    by_package = []
    for package, modules in sorted(packages.items()):
        rows = []
        for module in rng.sample(modules, len(modules)):
            if module not in chosen:
                drawn = rng.sample(sentences[module], min(SENTENCES_PER_MODULE, len(sentences[module])))
                rows += [(sentence, package, module) for sentence in drawn]
        if len(rows) >= 3 * PACKAGE_SENTENCES:  # the task takes at most a third of them away from training
            by_package += rows[:PACKAGE_SENTENCES]
    return {BY_MODULE: by_module, BY_PACKAGE: by_package}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.draw", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the two files into")
    return parser


def main(args: argparse.Namespace) -> None:
    paths = {name: args.out / f"{name}.jsonl.gz" for name in (BY_MODULE, BY_PACKAGE)}
    for path in paths.values():
        check_absent(path)
    for name, rows in draw_tasks(read_library(), random.Random(0)).items():
        lines = (json.dumps(dict(zip(("text", "label", "module"), row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
        write_new(paths[name], "".join(lines).encode())
        say(f"{paths[name]}: {len(rows)} sentences, {len({label for _, label, _ in rows})} clusters")


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
