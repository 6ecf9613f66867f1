"""The user's own texts with a teacher's vectors of them: the folder that `make_pairs.py auto` writes and `train.py --pairs` takes.

    texts.jsonl            {"text": str, "source": FILE:ROW}, a text a line, no two equal
    teacher.safetensors    "vectors" (N, E) float16 of norm 1, and "neighbours" (N, K) int32: the numbers of each text's K nearest
    general.jsonl          pairs that keep the model's general knowledge; missing where none were wanted
    recipe.json            what was chosen and why; "train": arguments of train.py (TRAIN_TYPES) where its command line gives no others

Importing this module loads neither torch nor a model.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from files.console import InputError
from files.reading import read_rows

TEXTS_FILE, TEACHER_FILE, GENERAL_FILE, RECIPE_FILE = "texts.jsonl", "teacher.safetensors", "general.jsonl", "recipe.json"
# Of a batch, what is own texts where there are general pairs as well; without these, clusters are slightly better (bench/README.md).
OWN_SHARE = 0.75
TRAIN_TYPES = {"steps": int, "pooling": str, "scope": str, "keep_bos": bool, "characters": int}  # what "train" may hold


def is_own_texts(path: Path) -> bool:
    """Whether a path of --pairs is a folder of `make_pairs.py auto`."""
    return (path / RECIPE_FILE).is_file()


def read_recipe(folder: Path) -> dict:
    """Raises InputError where recipe.json is damaged or of another version, or a file of the folder is missing."""
    try:
        recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        missing = [name for name in recipe["files"] if not (folder / name).is_file()]
        if any(type(value) is not TRAIN_TYPES.get(name) for name, value in recipe["train"].items()):
            raise ValueError("train")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        message = f"{folder / RECIPE_FILE} is damaged or of another version: make the folder again with make_pairs.py auto"
        raise InputError(message) from None
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}: make it again with make_pairs.py auto")
    return recipe


class OwnTexts:
    """Groups of three texts each: a text, and two of its neighbours. A text makes K // 2 groups, with other neighbours in each.

    characters    longer texts are cut to so many (see `beginning`), though the teacher's vectors are of the uncut texts; None: never
    sha256        of the whole texts and the vectors
    Raises InputError where the folder is damaged.
    """

    def __init__(self, folder: Path, characters: int | None = None):
        import datasets
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        read_recipe(folder)
        self.characters, hashes = characters, []
        for name in (TEXTS_FILE, TEACHER_FILE):
            with open(folder / name, "rb") as f:
                hashes.append(hashlib.file_digest(f, "sha256").hexdigest())
        self.sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest()
        datasets.disable_progress_bars()
        path, features = str(folder / TEXTS_FILE), datasets.Features({"text": datasets.Value("string")})
        try:
            self.texts = datasets.Dataset.from_generator(
                _text_rows, gen_kwargs={"path": path}, features=features, fingerprint=f"texts-1-{hashes[0]}"
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ from None
        try:
            tensors = load_file(folder / TEACHER_FILE)
            self.vectors, self.neighbours = tensors["vectors"], tensors["neighbours"]
            if not len(self.vectors) == len(self.neighbours) == len(self.texts) > self.neighbours.max():
                raise ValueError("other numbers of texts")
        except (SafetensorError, KeyError, ValueError):
            raise InputError(
                f"{folder / TEACHER_FILE} is damaged or of other texts: make the folder again with make_pairs.py auto"
            ) from None
        self.groups = self.neighbours.shape[1] // 2  # of each text

    def __len__(self) -> int:
        return len(self.texts) * self.groups

    def __getitem__(self, rows: list[int]) -> list[tuple[tuple[str, str, str], np.ndarray]]:
        """The three texts of each group, or their beginnings, and the teacher's vectors (3, E) of them."""
        numbers = []
        for row in rows:
            text, group = divmod(row, self.groups)
            numbers.append([text, *self.neighbours[text, 2 * group : 2 * group + 2].tolist()])
        texts = iter(self.texts[[number for three in numbers for number in three]]["text"])
        if self.characters:
            texts = (beginning(text, self.characters) for text in texts)
        return [((next(texts), next(texts), next(texts)), self.vectors[three]) for three in numbers]


def beginning(text: str, characters: int) -> str:
    """The first `characters` of a text and up to a tenth more, so that it ends at a space if one is there."""
    longest = characters + characters // 10
    if len(text) <= longest:
        return text
    end = text.find(" ", characters, longest + 1)
    return text[: end if end >= 0 else longest]


def _text_rows(path: str) -> Iterator[dict]:
    for place, row in read_rows(Path(path)):
        if not isinstance(row.get("text"), str):
            raise InputError(f"{place}: needs the string 'text'")
        yield {"text": row["text"]}
