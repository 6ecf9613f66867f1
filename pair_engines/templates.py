"""Instructions to a chat model, and the texts that it is given them for."""

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from files.console import InputError, say
from files.reading import TextStream, as_text, excerpt, read_lines
from pair_engines.durable import Failure, Job
from pair_engines.inputs import in_shard

# The five ways to rewrite of Roth et al. 2025 (arXiv 2507.22729, section on synthetic positives); the wording is ours.
TEMPLATES = {
    "detail": "Write this text again with more detail and the same meaning. Answer with the new text only.\n\n{text}",
    "simple": "Say the same thing as this text in simpler words. Answer with the new text only.\n\n{text}",
    "student": "You teach at a school. Explain this text to a student in your own words. Answer with the explanation only.\n\n{text}",
    "metaphor": "Find a metaphor that carries the idea of this text. Answer with the metaphor only.\n\n{text}",
    "question": "Which question would come to somebody who has just read this text? Answer with the question only.\n\n{text}",
}
THINKING = re.compile(r"<(think|thinking|thought)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
THINKING_END = re.compile(r"\A.*</(think|thinking|thought)>", re.DOTALL | re.IGNORECASE)  # of a block that the prompt has opened
THINKING_OPEN = re.compile(r"<(think|thinking|thought)>(?!.*</\1>)", re.DOTALL | re.IGNORECASE)
STILL_THINKING = "the model was still thinking at the last of its tokens: raise --max-new-tokens, or take a model that does not think"


def chosen_templates(args: argparse.Namespace) -> dict[str, str]:
    """Name -> instruction of the templates to draw from: those of --templates and of --template-file, by default all five.

    Raises InputError for a file that is no template.
    """
    names = args.templates if args.templates or args.template_file else list(TEMPLATES)
    return {name: TEMPLATES[name] for name in names or ()} | (read_templates(args.template_file) if args.template_file else {})


def read_templates(path: Path) -> dict[str, str]:
    """The templates of a user's file: a JSON object of names and instructions, or the text of one instruction, named as the file is.

    Each holds {text} where the text goes. Raises InputError for any other file.
    """
    content = "".join(line for _, line in read_lines(path)).strip()
    templates = {path.stem: content}
    if path.suffix.lower() == ".json":
        try:
            templates = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({excerpt(error)})") from None
    if not isinstance(templates, dict) or not templates:
        raise InputError(f"{path}: needs a JSON object of names and instructions, has {excerpt(content)}")
    for name, template in templates.items():
        try:
            missing = "{text}" not in as_text(template)
        except ValueError as error:
            raise InputError(f"{path}: template {excerpt(name)} {error}") from None
        if missing:
            raise InputError(f"{path}: template {excerpt(name)} has no {{text}} where the text goes: {excerpt(template)!r}")
    return templates


def is_question(template: str) -> bool:
    """Whether a template asks for a question, which is no paraphrase: its name begins with "question"."""
    return template.startswith("question")


def draw_jobs(args: argparse.Namespace, templates: dict[str, str]) -> Iterator[Job]:
    """Each text of --input with a template drawn at random for it; texts are read one at a time. Prints which column was taken."""
    rng, texts, names = random.Random(args.seed), TextStream(args.input, args.column), sorted(templates)
    say(f"{texts.name}: texts in {texts.choice}")
    for number, (source, text) in enumerate(itertools.islice(texts, args.limit)):
        template = rng.choice(names)
        if in_shard(args.shard, number):
            yield Job(number, source, text, template)
    say(texts.summary())


def instruction(job: Job, templates: dict[str, str]) -> str:
    """What the chat model is told."""
    return templates[job.template].replace("{text}", job.text)


def without_thinking(answer: str) -> str | Failure:
    """The answer without what a reasoning model has written to itself; a failure where it never came to the answer."""
    text = THINKING_END.sub("", THINKING.sub("", answer)).strip()
    return Failure(STILL_THINKING) if not text and THINKING_OPEN.search(answer) else text
