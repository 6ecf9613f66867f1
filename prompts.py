"""Prompts: what stands before and after a text, so that the last token holds the answer.

A prompt is a prefix and a suffix around the text, for each of the two roles a text can play (a search query, or a
document, which is everything else). This module knows strings only: `encoder/` turns them into token ids.

    from prompts import get_prompt
    get_prompt("cluster")                       # a preset
    get_prompt('The topic of "{text}" is:')     # any string with {text} in it
    get_prompt("none", query="query: {text}")   # another template for queries
    get_prompt("cluster || classify")           # several, presets or templates: the vector is the mean of theirs
"""

import itertools
import re
from dataclasses import dataclass, replace

from files.console import InputError

ROLES = ("query", "document")
BETWEEN = " || "  # stands between several prompts, with spaces or without


@dataclass(frozen=True)
class Prompt:
    """`template` holds `{text}` once, or twice: the vector is then read from the second. Several templates stand apart by BETWEEN.

    query    where it differs, the template of the role "query"
    """

    name: str
    template: str
    source: str
    query: str | None = None

    def roles(self) -> dict[str, dict[str, str] | list[dict[str, str]]]:
        """{"query": {"prefix", "suffix"}, "document": {...}}, as the contract stores them; with "middle" for a text that is given twice.

        Of several templates a role has the list.
        """
        return {"query": split_templates(self.query or self.template), "document": split_templates(self.template)}


def split_templates(templates: str) -> dict[str, str] | list[dict[str, str]]:
    """What `split_template` returns, or of several templates the list of it."""
    parts = [split_template(template) for template in apart(templates)]
    return parts[0] if len(parts) == 1 else parts


def apart(prompts: str) -> list[str]:
    """Each of several prompts by itself."""
    return re.split(rf" *{re.escape(BETWEEN.strip())} *", prompts)


def each_prompt(of_role: dict[str, str] | list[dict[str, str]]) -> list[dict[str, str]]:
    """The prompts of a role, one or several, as a list."""
    return of_role if isinstance(of_role, list) else [of_role]


def split_template(template: str) -> dict[str, str]:
    """'a {text} b' -> {"prefix": "a ", "suffix": " b"}; 'a {text} b {text}' has "middle": " b " as well.

    Other braces are ordinary characters. Raises InputError unless `{text}` occurs once or twice.
    """
    parts = template.split("{text}")
    if len(parts) not in (2, 3):
        n = len(parts) - 1
        raise InputError(f"a prompt needs {{text}} once, or twice to read the second, this one has it {n} times: {template!r}")
    return dict(zip(("prefix", "suffix") if len(parts) == 2 else ("prefix", "middle", "suffix"), parts, strict=True))


def join_template(of_role: dict[str, str] | list[dict[str, str]]) -> str:
    """What `split_templates` was given."""
    names = ("prefix", "middle", "suffix")
    return BETWEEN.join("{text}".join(parts[name] for name in names if name in parts) for parts in each_prompt(of_role))


ROTH = "Roth et al. 2025, arXiv 2507.22729"
# after MetaEOL's four tasks, two prompts each: classification, sentiment, paraphrase, information extraction
META_EOL = (
    'Texts are to be sorted by subject, such as science, business, sport, health or politics. In one word, this text: "{text}" is about:',
    'Facts are to be told from opinions. In one word, what this text: "{text}" states is:',
    'Reviews are to be rated, from very bad to very good. In one word, this text: "{text}" finds its subject:',
    'The feeling behind a text is to be named, such as joy, anger, fear or grief. In one word, whoever wrote this text: "{text}" feels:',
    'It is to be decided whether two texts say the same. In one word, this text: "{text}" says:',
    'Expressions are to be replaced by others of the same meaning. In one word, this text: "{text}" could be replaced by:',
    'The most important fact of a report is to be picked out. In one word, the key fact of this text: "{text}" is:',
    'Who and what a text names is to be listed, and how they are related. In one word, this text: "{text}" is mainly about:',
)

PROMPTS = {
    p.name: p
    for p in (
        Prompt("none", "{text}", "no prompt"),
        Prompt("prompt-eol", 'This sentence: "{text}" means in one word:', "PromptEOL, Jiang et al. 2023, arXiv 2307.16645"),
        Prompt(
            "pretended-cot",
            'After thinking step by step, this sentence: "{text}" means in one word:',
            "Pretended CoT, Zhang et al. 2024, arXiv 2404.03921",
        ),
        Prompt(
            "knowledge",
            "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms provide "
            'additional but less central details. With this in mind, this sentence: "{text}" means in one word:',
            "Knowledge Enhancement, Zhang et al. 2024, arXiv 2404.03921",
        ),
        Prompt("summarize", 'This sentence: "{text}" can be summarized as', "PromptSUM, Zhang et al. 2024, arXiv 2404.03921"),
        Prompt("cluster", 'This sentence: "{text}" belongs to the following cluster:', ROTH),
        Prompt("classify", 'This sentence: "{text}" can be classified as:', ROTH),
        Prompt(
            "echo",
            "Rewrite the sentence: {text}\nThe rewritten sentence: {text}",
            "the text twice, the second read with the first in view: Springer et al. 2024, arXiv 2402.15449",
        ),
        Prompt(
            "meta-eol",
            BETWEEN.join(META_EOL),
            "several tasks, the mean of their vectors: MetaEOL, Lei et al. 2024, arXiv 2402.18458; the wording is this project's",
        ),
        Prompt(
            "retrieve",
            'This passage: "{text}" answers a question about, in one word:',
            "this project, after PromptEOL: one wording for each side of the search",
            query='This question: "{text}" is answered by a passage about, in one word:',
        ),
        Prompt(
            "emotion",
            'Classify the emotion expressed in the given Twitter message "{text}" into one of the six emotions: '
            "anger, fear, joy, love, sadness, and surprise:",
            ROTH + "; the word 'message' and the last colon are this project's",
        ),
    )
}

# Which prompt an untuned base gets for an MTEB task type when none is asked for. A trained run has its own.
TASK_PROMPTS = {
    "Clustering": "cluster",
    "Classification": "classify",
    "MultilabelClassification": "classify",
    "PairClassification": "prompt-eol",
    "STS": "prompt-eol",
    "BitextMining": "prompt-eol",
    "Summarization": "summarize",
    "Retrieval": "retrieve",
    "Reranking": "retrieve",
    "InstructionRetrieval": "retrieve",
    "InstructionReranking": "retrieve",
}


def get_prompt(prompt: str | Prompt, query: str | Prompt | None = None) -> Prompt:
    """A preset by its exact name, a template with `{text}` in it, or several of either with BETWEEN between them.

    query    preset or template of the role "query", where it is to be another one
    Raises InputError and lists the choices.
    """
    if query is not None:
        queries = get_prompt(query)
        return replace(get_prompt(prompt), name="custom", query=queries.query or queries.template)
    if isinstance(prompt, Prompt):
        return prompt
    if not isinstance(prompt, str):
        raise InputError(f"a prompt is a preset's name or a string with {{text}} in it, not {prompt!r}")
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    if len(apart(prompt)) > 1:
        several = [get_prompt(one) for one in apart(prompt)]
        template, queries = (BETWEEN.join(texts) for texts in zip(*((p.template, p.query or p.template) for p in several), strict=True))
        return Prompt("custom", template, "given on the command line", queries if queries != template else None)
    if "{text}" in prompt:
        split_template(prompt)
        return Prompt("custom", prompt, "given on the command line")
    raise InputError(f"unknown prompt {prompt!r}: take one of {', '.join(PROMPTS)}, or write a string with {{text}} in it")


def prompt_label(roles: dict) -> str:
    """The name of the preset with these prefixes and suffixes, else the template; both templates where the roles differ."""
    for prompt in PROMPTS.values():
        if prompt.roles() == roles:
            return prompt.name
    document, query = (join_template(roles[role]) for role in ("document", "query"))
    return document if query == document else f"{document} (queries: {query})"


def contrast(one: dict, other: dict, length: int = 60) -> tuple[str, str]:
    """The labels of two prompts, each cut to `length` characters around the first one that differs."""
    labels = prompt_label(one), prompt_label(other)
    same = sum(itertools.takewhile(bool, (a == b for a, b in zip(*labels, strict=False))))
    begin = max(0, same - length // 3)
    short = ["…" * (begin > 0) + label[begin : begin + length] + "…" * (len(label) > begin + length) for label in labels]
    return short[0], short[1]
