"""Docstrings of the installed packages and the standard library, and the texts that must stay out of training.

Source files are parsed, never imported, so that no code of theirs runs.

Excluded texts are those of the bundled evaluation tasks and of files that the user names. Texts are compared by
`normalized_key`, which ignores case, digits and punctuation.
"""

import ast
import itertools
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from files.console import InputError
from files.reading import read_rows

TASKS_FOLDER = Path(__file__).resolve().parent.parent / "tasks"

# Installers and other tools, which are not libraries.
NOT_LIBRARIES = {"pip", "setuptools", "pkg_resources", "wheel", "ensurepip", "site-packages", "lib2to3", "idlelib"}
# Packages that were added after the README's figures were measured and must not change the pairs.
NOT_LIBRARIES |= {"hypothesis", "sortedcontainers", "_hypothesis_ftz_detector", "_hypothesis_globals", "_hypothesis_pytestplugin"}
NOT_LIBRARIES |= {"rapidfuzz", "datasketch", "py3langid", "plotly", "_plotly_utils"}

SECTION_TITLE = re.compile(
    r"^(args?|arguments|parameters?|params|returns?|yields?|raises?|examples?|notes?|references?|see also|attributes|methods|usage|"
    r"warnings?|keyword arguments|kwargs|inputs?|outputs?|shape|todo|explanation|other parameters)\b[^.]{0,30}:?$",
    re.IGNORECASE,
)
UNDERLINE = re.compile(r"\n\s*[-=~]{3,}\s*$", re.MULTILINE)  # under a heading
MARKUP = (
    (re.compile(r":[\w:+-]+:`~?([^`<]*?)\s*(?:<[^`>]*>)?`"), r"\1"),  # :class:`~a.B`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*"), r"\1"),  # `text <link>`_
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](link)
    (re.compile(r"`+|\*\*|__"), ""),
    (re.compile(r"\|(\w+)\|_?"), r"\1"),  # |substitution|
    (re.compile(r"\s+"), " "),
)
NOT_PROSE = re.compile(r">>>|^\s*(\.\.|[-*+|#=]|:\w+|\d+[.)] )|::\s*$|^\s*\w+ ?(\([^)]*\))? ?:( |$)", re.MULTILINE)
READABLE_SHARE = 0.85  # of a paragraph's characters must be letters or spaces
MAX_PROSE_WORDS = 64
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class LibraryModule(NamedTuple):
    name: str  # dotted, such as "json.decoder"
    path: Path  # of its source file


class DocstringText(NamedTuple):
    module: str
    sentence: str  # the docstring's first sentence
    prose: str  # what follows it, "" where nothing does


class Excluded(NamedTuple):
    modules: set[str]  # names of modules none of whose docstrings may be used
    keys: set[str]  # normalized keys of texts


# ---------------------------------------------------------------------------------------------------------- source files


def library_modules() -> list[LibraryModule]:
    """Every library module of this environment: installed packages first, then the standard library. Tests are left out."""
    modules = []
    for root in (Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"])):
        for folder, children, names in os.walk(root):
            # os.walk goes into the folders that are left in the list, in its order
            children[:] = sorted(c for c in children if c.isidentifier() and not c.startswith("test") and c not in NOT_LIBRARIES)
            for file_name in sorted(names):
                path = Path(folder) / file_name
                if path.suffix != ".py" or file_name.startswith("test") or (path.parent == root and path.stem in NOT_LIBRARIES):
                    continue
                name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
                modules.append(LibraryModule(name, path))
    return modules


def read_docstrings(path: Path) -> list[str]:
    """The docstrings of one source file; none where it is not valid Python 3."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):  # Python 2 code and code templates
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [d.strip() for d in docstrings if d and d.strip()]


# ------------------------------------------------------------------------------------------------- from markup to prose


def strip_markup(text: str) -> str:
    """The text on one line, without the markup of reStructuredText and Markdown."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is running text: no code, list, table, field or formula."""
    readable = sum(c.isalpha() or c.isspace() for c in paragraph)
    return not NOT_PROSE.search(paragraph) and readable > READABLE_SHARE * len(paragraph)


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """The docstring's first sentence and the prose after it ("" if there is none); None where it opens with markup.

    The prose is the rest of the first paragraph and the next paragraph of running text before the first section, cut to
    `MAX_PROSE_WORDS` words.
    """
    paragraphs = [p for p in re.split(r"\n\s*\n", docstring.strip()) if p.strip()]
    if not paragraphs or not is_prose(paragraphs[0]):
        return None
    sentence, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z])", strip_markup(paragraphs[0]), maxsplit=1)
    for paragraph in paragraphs[1:]:
        first_line = paragraph.strip().split("\n")[0].strip()
        if SECTION_TITLE.match(first_line) or UNDERLINE.search(paragraph):
            break
        if is_prose(paragraph):
            rest.append(strip_markup(paragraph))
            break
    return sentence, " ".join(" ".join(rest).split()[:MAX_PROSE_WORDS])


def split_module(module: LibraryModule) -> list[DocstringText]:
    """The docstrings of one module that begin with prose."""
    texts = (split_docstring(docstring) for docstring in read_docstrings(module.path))
    return [DocstringText(module.name, *text) for text in texts if text]


def read_library() -> list[DocstringText]:
    """The docstrings of all library modules that begin with prose, in the order of `library_modules`."""
    with ProcessPoolExecutor() as pool:
        return list(itertools.chain.from_iterable(pool.map(split_module, library_modules(), chunksize=64)))


# -------------------------------------------------------------------------------------------------------- excluded texts


def normalized_key(text: str) -> str:
    """Equal for texts that differ in case, digits and punctuation only."""
    return re.sub(r"[\W\d_]+", " ", text.lower()).strip()


def bundled_task_files() -> list[Path]:
    """The bundled evaluation tasks, whose texts and modules must not be trained on."""
    return sorted(TASKS_FOLDER.glob("*.jsonl.gz"))


def read_excluded(paths: Iterable[Path]) -> Excluded:
    """The texts of files with a column `text`, and the modules where they have a column `module`.

    Raises InputError, with the place, for a row without a text.
    """
    excluded = Excluded(set(), set())
    for path in paths:
        for place, row in read_rows(path):
            if not isinstance(row.get("text"), str):
                raise InputError(f"{place}: needs a column 'text' that holds a string")
            excluded.keys.add(normalized_key(row["text"]))
            if isinstance(row.get("module"), str):
                excluded.modules.add(row["module"])
    excluded.keys.discard("")  # a text without any letter
    return excluded


def contains_excluded(document: str, keys: set[str]) -> bool:
    """Whether the whole document, one of its lines or sentences, or two sentences in a row have one of the keys."""
    for line in document.split("\n"):
        sentences = [normalized_key(sentence) for sentence in SENTENCE_END.split(line)]
        pairs = itertools.pairwise([*sentences, ""])
        if normalized_key(line) in keys or any(first in keys or f"{first} {second}" in keys for first, second in pairs):
            return True
    return normalized_key(document) in keys


def read_allowed_docstrings(module: LibraryModule, excluded: Excluded) -> list[str]:
    """The docstrings of one library module, without excluded ones."""
    if module.name in excluded.modules:
        return []
    unwrapped = ((d, re.sub(r"[ \t]*\n(?!\s*\n)[ \t]*", " ", d)) for d in read_docstrings(module.path))  # sentences go over several lines
    return [docstring for docstring, text in unwrapped if not contains_excluded(text, excluded.keys)]
