"""From texts to token ids: [BOS | prefix | text, truncated | suffix | EOS], by a contract and a tokenizer.

Where the contract's prompt has a middle, [BOS | prefix | text | middle | text | suffix | EOS], of which the second text is read.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from encoder.contract import Contract
from files.console import InputError
from prompts import ROLES

CHUNK = 512  # texts that are tokenized at a time: the tokenizer's result takes many times the memory of the ids


class TokenizedTexts(NamedTuple):
    """Texts as token ids, prompt included."""

    ids: list[list[int]]
    spans: list[tuple[int, int]]  # where in its sequence each text starts and ends; of two, the second
    prefix_length: int  # BOS and the prompt's prefix: the first ids, which are the same in all sequences
    n_empty: int
    n_truncated: int


class PromptTokenizer:
    """The prompts of a contract, tokenized once, and the way from texts to ids."""

    def __init__(self, tokenizer, contract: Contract, positions: int | None):
        """positions: how many tokens the model can read. Raises InputError where prompt and `max_tokens` are more than that."""
        self.backend, self.contract = tokenizer.backend_tokenizer, contract
        self.bos = [tokenizer.bos_token_id] if contract.bos else []
        self.eos = [tokenizer.eos_token_id] if contract.eos else []
        self.prompt_ids = {role: self._ids([p["prefix"], p["suffix"]]) for role, p in contract.prompts.items()}
        self.middle_ids = {role: self._ids([p["middle"]])[0] for role, p in contract.prompts.items() if "middle" in p}
        for role in contract.prompts:
            n_prompt = sum(map(len, (*self.around(role), self.middle_ids.get(role, []))))
            copies = 2 if role in self.middle_ids else 1
            if positions and n_prompt + copies * contract.max_tokens > positions:
                room = (positions - n_prompt) // copies
                advice = f"take at most {room}" if room > 0 else "take a shorter prompt"
                twice = "2 x " if copies == 2 else ""
                raise InputError(
                    f"{twice}max_tokens {contract.max_tokens} + {n_prompt} tokens of prompt do not fit the model's {positions} positions: "
                    f"{advice}"
                )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # the Python wrapper around the backend takes as long again
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)] if texts else []

    def around(self, role: str) -> tuple[list[int], list[int]]:
        """The ids before every text of a role (BOS and prefix) and after it (suffix and EOS)."""
        prefix, suffix = self.prompt_ids[role]
        return self.bos + prefix, suffix + self.eos

    def __call__(self, texts: list[str], role: str, first_number: int) -> TokenizedTexts:
        """Prefix, text and suffix are tokenized separately; the text is truncated to `max_tokens`, the prompt never is.

        first_number    number of the first text in error messages
        Raises InputError for an unknown role and for what is no text.
        """
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}: take one of {', '.join(ROLES)}")
        for i, text in enumerate(texts, first_number):
            if not isinstance(text, str):
                raise InputError(f"text {i} is {type(text).__name__} {text!r}, not a string")
        (before, after), middle, max_tokens = self.around(role), self.middle_ids.get(role), self.contract.max_tokens
        ids, spans, n_empty, n_truncated = [], [], 0, 0
        for start in range(0, len(texts), CHUNK):
            for text_ids in self._chunk_ids(texts[start : start + CHUNK], first_number + start):
                n_empty += not text_ids
                n_truncated += len(text_ids) > max_tokens
                text_ids = text_ids[:max_tokens]
                start_of_text = before if middle is None else before + text_ids + middle
                ids.append(start_of_text + text_ids + after)
                spans.append((len(start_of_text), len(start_of_text) + len(text_ids)))
        return TokenizedTexts(ids, spans, len(before), n_empty, n_truncated)

    def _chunk_ids(self, texts: list[str], first_number: int) -> list[list[int]]:
        try:
            return self._ids(texts)
        except TypeError:  # half of a surrogate pair, as JSON may hold it, is no character
            number, text = next((i, t) for i, t in enumerate(texts, first_number) if t.encode("utf-8", "replace").decode() != t)
            raise InputError(f"text {number} holds half a surrogate pair and cannot be written as UTF-8: {text[:60]!a}") from None

    def parts(self, length: int, span: tuple[int, int]) -> list[str]:
        """The part of a sequence that each of its tokens belongs to: "bos", "prompt", "text" or "eos"; of two texts the first is prompt."""
        parts = ["text" if span[0] <= i < span[1] else "prompt" for i in range(length)]
        if self.bos:
            parts[0] = "bos"
        if self.eos:
            parts[-1] = "eos"
        return parts


def readable_pieces(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    """Each token as text. Of tokens that are bytes of one character, the first is that character and the others are empty."""
    pieces, i = [], 0
    while i < len(ids):
        text, n = decode(ids[i : i + 1]), 1
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # not a whole character, of which UTF-8 has four bytes at most
            for m in range(2, min(4, len(ids) - i) + 1):
                if "\N{REPLACEMENT CHARACTER}" not in (longer := decode(ids[i : i + m])):
                    text, n = longer, m
                    break
        pieces += [text, *[""] * (n - 1)]
        i += n
    return pieces


def check_list(texts: Iterable[str]) -> Iterable[str]:
    """Raise InputError for a single string, which Python would take for a list of characters."""
    if isinstance(texts, str):
        raise InputError("texts must be a list of strings: put a single text in brackets")
    return texts
