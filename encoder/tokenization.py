"""From texts to token ids: [BOS | prefix | text, truncated | suffix | EOS], by a contract and a tokenizer.

Where the contract's prompt has a middle, [BOS | prefix | text | middle | text | suffix | EOS], of which the second text is read.
With token prepending a placeholder stands before the text, and before a quotation mark that opens there. Of several prompts each makes
a sequence of every text.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from encoder.contract import Contract
from files.console import InputError
from prompts import ROLES

QUOTATION_MARKS = ('"', "'", "“", "‘", "„", "«")
PARTS = ("bos", "prefix", "text", "suffix", "eos")  # of a sequence; prefix and suffix are the prompt before and behind the text
CHUNK = 512  # texts that are tokenized at a time: the tokenizer's result takes many times the memory of the ids


class TokenizedTexts(NamedTuple):
    """Texts as token ids, prompt included."""

    ids: list[list[int]]
    spans: list[tuple[int, int]]  # where in its sequence each text starts and ends; of two, the second
    prefix_length: int  # BOS and the prompt's prefix, as far as the placeholder: the first ids, which are the same in all sequences
    n_empty: int
    n_truncated: int
    placeholder: int | None = None  # where in every sequence that has a token the placeholder of token prepending stands
    more: tuple["TokenizedTexts", ...] = ()  # the same texts under the other prompts of their role

    def filled(self) -> list[int]:
        """The numbers of the texts that have a token under some prompt."""
        return [i for i, ids in enumerate(self.ids) if ids or any(others.ids[i] for others in self.more)]


class PromptIds(NamedTuple):
    """A prompt as token ids.

    quotes    whether the prefix ends with a quotation mark, and its last token with it
    """

    quotes: bool
    prefix: list[int]
    middle: list[int] | None
    suffix: list[int]


class PromptTokenizer:
    """The prompts of a contract, tokenized once, and the way from texts to ids."""

    def __init__(self, tokenizer, contract: Contract, positions: int | None):
        """positions: how many tokens the model can read. Raises InputError where prompt and `max_tokens` are more than that."""
        self.backend, self.contract = tokenizer.backend_tokenizer, contract
        self.bos = [tokenizer.bos_token_id] if contract.bos else []
        self.eos = [tokenizer.eos_token_id] if contract.eos else []
        self.prompt_ids = {role: list(map(self._prompt_ids, contract.prompts_of(role))) for role in contract.prompts}
        for prompt in itertools.chain(*self.prompt_ids.values()):
            n_prompt = sum(map(len, (self.bos, prompt.prefix, prompt.middle or [], prompt.suffix, self.eos)))
            n_prompt += contract.token_prepending is not None
            copies = 1 if prompt.middle is None else 2
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

    def _prompt_ids(self, prompt: dict[str, str]) -> PromptIds:
        ids = {name: self._ids([prompt[name]])[0] if name in prompt else None for name in PromptIds._fields[1:]}
        return PromptIds(prompt["prefix"].endswith(QUOTATION_MARKS), **ids)

    def around(self, role: str) -> tuple[list[int], list[int]]:
        """The ids before every text of a role (BOS and prefix) and after it (suffix and EOS); of several prompts by the first."""
        prompt = self.prompt_ids[role][0]
        return self.bos + prompt.prefix, prompt.suffix + self.eos

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
        chunks = (self._chunk_ids(texts[start : start + CHUNK], first_number + start) for start in range(0, len(texts), CHUNK))
        whole, max_tokens = list(itertools.chain(*chunks)), self.contract.max_tokens
        n_empty, n_truncated = sum(not ids for ids in whole), sum(len(ids) > max_tokens for ids in whole)
        text_ids = [ids[:max_tokens] for ids in whole]
        first, *more = (self._with_prompt(prompt, text_ids) for prompt in self.prompt_ids[role])
        return first._replace(n_empty=n_empty, n_truncated=n_truncated, more=tuple(more))

    def _with_prompt(self, prompt: PromptIds, text_ids: list[list[int]]) -> TokenizedTexts:
        before, after = self.bos + prompt.prefix, prompt.suffix + self.eos
        prepends, ids, spans = self.contract.token_prepending is not None, [], []
        n_before = len(before) - (prepends and prompt.quotes)
        before, opening = before[:n_before], before[n_before:]
        for text in text_ids:
            rest = opening + text + after if prompt.middle is None else opening + text + prompt.middle + text + after
            if prepends:
                rest = (before + rest)[-1:] + rest  # a copy of the last token, whose states it will be given
            ids.append(before + rest)
            end = len(ids[-1]) - len(after)
            spans.append((end - len(text), end))
        return TokenizedTexts(ids, spans, len(before), 0, 0, len(before) if prepends else None)

    def _chunk_ids(self, texts: list[str], first_number: int) -> list[list[int]]:
        try:
            return self._ids(texts)
        except TypeError:  # half of a surrogate pair, as JSON may hold it, is no character
            number, text = next((i, t) for i, t in enumerate(texts, first_number) if t.encode("utf-8", "replace").decode() != t)
            raise InputError(f"text {number} holds half a surrogate pair and cannot be written as UTF-8: {text[:60]!a}") from None

    def parts(self, length: int, span: tuple[int, int]) -> list[str]:
        """The part of a sequence that each of its tokens belongs to, one of PARTS; of two texts the first is prefix."""
        parts = ["prefix"] * span[0] + ["text"] * (span[1] - span[0]) + ["suffix"] * (length - span[1])
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
