"""Pairs from the docstrings of the installed packages and the standard library."""

import argparse
import random

from files.docstrings import SENTENCE_END, bundled_task_files, normalized_key, read_excluded, read_library


def docstring_pairs(args: argparse.Namespace) -> list[dict]:
    """A docstring's first sentence (4 to 40 words) and the prose after it (8 words or more), each text used only once."""
    excluded = read_excluded(bundled_task_files())
    pairs, seen = [], set(excluded.keys)
    for module, sentence, prose in read_library():
        if module in excluded.modules or not 4 <= len(sentence.split()) <= 40 or len(prose.split()) < 8:
            continue
        anchor, positive = normalized_key(sentence), normalized_key(prose)
        if anchor in seen or positive in seen or excluded.keys & {normalized_key(s) for s in SENTENCE_END.split(prose)}:
            continue
        seen |= {anchor, positive}
        pairs.append({"anchor": sentence, "positive": prose, "engine": "docstrings", "source": module})
    random.Random(args.seed).shuffle(pairs)
    return pairs
