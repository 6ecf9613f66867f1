"""The proof that an exported folder gives our vectors, and where it does not, the name of the part that differs.

The truth is `Encoder` with the adapter unmerged, in float32. What a runtime may do wrong (drop the suffix, double BOS, cut elsewhere,
pool otherwise, ...) is computed as well: the fault whose vectors are the runtime's is the one to name.

Legend: N texts, D numbers of a vector.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from encoder.contract import PoolingConfig
from encoder.tokenization import TokenizedTexts
from files.console import InputError

if TYPE_CHECKING:
    from encoder import Encoder

EXACT = ("float32", "f32")  # dtypes of exported weights, as PyTorch and llama.cpp name them
MIN_COSINE = dict.fromkeys(EXACT, 0.999) | dict.fromkeys(("bfloat16", "float16", "bf16", "f16", "q8_0"), 0.995)
SAME = 1e-5  # 1 - cosine of vectors that differ by the rounding of float32 alone
NORM = 0.01  # relative difference of lengths
# of all lengths and scripts; what looks like a special token must be read as ours reads it
SAMPLES = (
    "",
    " ",
    "a",
    "42",
    "Cat",
    "a cat sleeps on the mat",
    "  leading and trailing spaces  ",
    "two\nlines\tand a tab",
    "Interest rates rose again this month, and every account that is overdrawn now costs more than before.",
    "def add(a, b):\n    return a + b  # the sum",
    "Où est la gare, s'il vous plaît ?",
    "Wie kann ich mein Konto schließen?",
    "银行本月再次提高了利率。",
    "東京の銀行は金利を上げました。",
    "은행이 금리를 올렸다",
    "Банк снова поднял процентные ставки.",
    "رفع البنك أسعار الفائدة",
    "बैंक ने ब्याज दरें बढ़ाईं",
    "ธนาคารขึ้นอัตราดอกเบี้ย",
    "👍🏽 great 🎉",
    "e\u0301 is not always \u00e9, nor ﬁ fi",
    "<s> text </s>",
    "<|endoftext|>",
    '{"role": "user", "content": "hi"}',
)
LENGTHS = (0.1, 0.3, 0.7, 0.95, 1.0, 1.1, 2.0, 3.0)  # of further texts, as shares of the limit


class VerificationFailed(InputError):
    """A folder whose vectors are not ours."""


class Sequence(NamedTuple):
    """Token ids, and where the text stands in them."""

    ids: list[int]
    span: tuple[int, int]


class Check(NamedTuple):
    """A line of the table: how near a runtime's vectors come to the truth."""

    role: str
    what: str
    cosine: float  # the smallest of all texts
    needs: float  # what it has to be
    n_refused: int = 0  # texts that the runtime does not take

    def line(self) -> str:
        refused = f", {self.n_refused} empty text{'s' * (self.n_refused > 1)} refused" if self.n_refused else ""
        return f"{self.role}, {self.what}: smallest cosine {self.cosine:.6f} (needs {self.needs}){refused}"


def sample_texts(encoder: "Encoder") -> list[str]:
    """32 texts of all lengths and scripts, some of them past the limit; without a prompt or BOS, those that have a token."""
    sentence = "the bank raised its rates and a cat slept on the mat while we were reading about it"
    words, limit = sentence.split(), encoder.contract.max_tokens
    texts = list(SAMPLES)
    for share in LENGTHS:
        count = max(1, int(share * limit))
        text = " ".join(words[(i * i + i) % len(words)] for i in range(count))  # about a token a word
        texts.append(text)
    tokenized = encoder.tokenize(texts)
    return [text for text, ids in zip(texts, tokenized.ids, strict=True) if ids]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rows of two arrays (N, D), in float64; 1 for two vectors of zeros."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (np.linalg.norm(a, axis=1) == 0) & (np.linalg.norm(b, axis=1) == 0)
    return np.where(both_zero, 1.0, (a * b).sum(1) / np.maximum(norms, 1e-30))


def embed_sequences(encoder: "Encoder", sequences: list[Sequence], pooling: PoolingConfig | None = None) -> np.ndarray:
    """Vectors (N, D) of token ids as they stand, pooled by the contract or otherwise."""
    import torch

    tokenized = TokenizedTexts([s.ids for s in sequences], [s.span for s in sequences], 0, 0, 0)
    vectors = np.zeros((len(sequences), encoder.width), np.float32)
    with torch.no_grad():
        for rows, batch in encoder.batches(tokenized, [i for i, s in enumerate(sequences) if s.ids]):
            vectors[rows] = encoder.embed(batch, [pooling or encoder.contract.pooling_config()])[0].float().cpu().numpy()
    return vectors


def sequence(before: list[int], text: list[int], after: list[int]) -> Sequence:
    return Sequence(before + text + after, (len(before), len(before) + len(text)))


def token_faults(encoder: "Encoder", role: str, texts: list[str]) -> Iterator[tuple[str, list[Sequence]]]:
    """What runtimes do wrong with tokens: a name, and the sequences that would come of it."""
    contract, tokenizer, max_tokens = encoder.contract, encoder.tokenizer, encoder.contract.max_tokens
    around = encoder.prompt_tokenizer
    before, after = around.around(role)
    bos, eos = around.bos, around.eos
    _, prefix, _, suffix = around.prompt_ids[role][0]
    whole = [encoding.ids for encoding in around.backend.encode_batch(texts, add_special_tokens=False)]
    cut = [ids[:max_tokens] for ids in whole]
    limit = len(before) + max_tokens + len(after)
    room = (getattr(encoder.decoder.config, "max_position_embeddings", None) or 10**9) - len(before) - len(after)

    def each(before: list[int], texts: list[list[int]], after: list[int]) -> list[Sequence]:
        return [sequence(before, text, after) for text in texts]

    def clipped(sequences: list[Sequence], part: slice) -> list[Sequence]:
        return [Sequence(s.ids[part], (min(s.span[0], limit), min(s.span[1], limit))) for s in sequences]

    if prefix or suffix:
        yield "prompt: it is missing", each(bos, cut, eos)
    if prefix:
        yield "prompt: its prefix is missing", each(bos, cut, after)
    if suffix:
        yield "prompt: its suffix is missing", each(before, cut, eos)
    if bos:
        yield "BOS: it is missing", each(prefix, cut, after)
        yield "BOS: it stands there twice", each(bos + before, cut, after)
    elif tokenizer.bos_token_id is not None:
        yield "BOS: it is added", each([tokenizer.bos_token_id, *before], cut, after)
    if eos:
        yield "EOS: it is missing", each(before, cut, suffix)
        yield "EOS: it stands there twice", each(before, cut, after + eos)
    elif tokenizer.eos_token_id is not None:
        yield "EOS: it is added", each(before, cut, [*after, tokenizer.eos_token_id])
    yield "cut: long texts are not cut, or not before the model's own limit", each(before, [ids[:room] for ids in whole], after)
    yield "cut: it takes away what stands behind long texts", clipped(each(before, whole, after), slice(limit))
    yield "cut: it takes away the beginning of long texts, prompt included", clipped(each(before, whole, after), slice(-limit, None))
    yield "cut: it takes away the beginning of long texts", each(before, [ids[-max_tokens:] for ids in whole], after)
    for other in contract.prompts:
        if other != role and contract.prompts[other] != contract.prompts[role]:
            yield f"prompt: it is that of a {other}", each(around.around(other)[0], cut, around.around(other)[1])
    if tokenizer.chat_template:
        prompt = contract.prompts[role]
        for name, parts in (("", ("", "")), (", around prompt and text", (prompt["prefix"], prompt["suffix"]))):
            chats = [[{"role": "user", "content": parts[0] + text + parts[1]}] for text in texts]
            try:
                rendered = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            except Exception:  # templates are programs of their own, and this one does not take such a chat
                continue
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            yield f"prompt: a chat template is applied{name}", [Sequence(x[:limit], (0, min(len(x), limit))) for x in ids]


def pooling_faults(contract) -> Iterator[tuple[str, PoolingConfig]]:
    own = contract.pooling_config()
    for pooling in ("mean", "last", "position-mean"):
        for scope, keep_bos in (("all", True), ("all", False), ("text", False)):
            other = PoolingConfig(pooling, scope, own.layers, keep_bos)
            if other != own:
                which = "the text's tokens" if scope == "text" else "all tokens" if keep_bos or not contract.bos else "all tokens but BOS"
                yield f"pooling: it is {pooling} over {which}", other


def known_fault(
    encoder: "Encoder", role: str, texts: list[str], vectors: np.ndarray, base: np.ndarray | None, tolerance: float
) -> str | None:
    """The name of the fault whose vectors are these.

    encoder      in float32, its adapter merged or not
    vectors      (N, D) of a runtime, not NaN
    base         vectors of the untuned base, where there is an adapter
    tolerance    1 - cosine that rounding may cost
    """
    truth, lengths = encoder.encode(texts, role), text_lengths(encoder, texts)
    short = lengths <= encoder.contract.max_tokens

    def is_it(other: np.ndarray, rows: np.ndarray) -> bool:
        differs = (1 - cosines(other, truth) > 2 * tolerance)[rows].any()
        return differs and (1 - cosines(other, vectors) < tolerance)[rows].all()

    every = np.ones(len(texts), bool)
    if base is not None and is_it(base, every):
        return "weights: they are those of the untuned base, the adapter is missing"
    for name, sequences in token_faults(encoder, role, texts):
        if is_it(embed_sequences(encoder, sequences), compared_rows(name, short)):
            return name
    for name, pooling in pooling_faults(encoder.contract):
        if is_it(embed_sequences(encoder, own_sequences(encoder, role, texts), pooling), every):
            return name
    return fault_of_length(1 - cosines(vectors, truth) > tolerance, lengths)


def compared_rows(fault: str, short: np.ndarray) -> np.ndarray:
    """The texts (N,) that tell a fault: where a part is missing, long texts may be cut at the old limit or at a new one."""
    return short | fault.startswith("cut")


def fault_of_length(wrong: np.ndarray, lengths: np.ndarray) -> str | None:
    """The limit, where the texts that are wrong (N,) are those longer than all others."""
    if wrong.any() and not wrong.all() and lengths[wrong].min() > lengths[~wrong].max():
        return "cut: long texts are cut at another limit"
    return None


def own_sequences(encoder: "Encoder", role: str, texts: list[str]) -> list[Sequence]:
    tokenized = encoder.tokenize(texts, role)
    return [Sequence(ids, span) for ids, span in zip(tokenized.ids, tokenized.spans, strict=True)]


def text_lengths(encoder: "Encoder", texts: list[str]) -> np.ndarray:
    """Tokens of each text (N,), without a prompt and without a limit."""
    encodings = encoder.prompt_tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    return np.array([len(encoding.ids) for encoding in encodings])


def where_they_differ(truth: np.ndarray, vectors: np.ndarray, texts: list[str], dtype: str, tolerance: float) -> str:
    """What is known of vectors that no known fault explains."""
    if dtype not in EXACT:
        finer = "--merge-dtype float32" if dtype in ("bfloat16", "float16") else "a finer --gguf-type"
        return f"weights: no known fault explains it, {dtype} may be too coarse for this adapter: take {finer}"
    wrong = 1 - cosines(vectors, truth) > tolerance
    if wrong.all():
        return "weights: every text differs, and no known fault of tokens or pooling explains it"
    return f"tokens: {wrong.sum()} of {len(texts)} texts differ, the first is {texts[int(np.flatnonzero(wrong)[0])][:60]!r}"


def ids_of_folder(folder: Path, texts: list[str]) -> list[list[int]]:
    """Token ids by the tokenizer of an exported folder: by transformers, or by tokenizer.json alone where there is no more."""
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)(texts, truncation=True)["input_ids"]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


class Truth:
    """What an exported folder must give.

    encoder    in float32, its adapter unmerged
    Raises VerificationFailed where the adapter changes nothing.
    """

    def __init__(self, encoder: "Encoder", roles: list[str]):
        self.encoder, self.texts = encoder, sample_texts(encoder)
        self.vectors = {role: encoder.encode(self.texts, role) for role in roles}
        self.base = {}
        if encoder.peft is not None:
            untuned = encoder.untuned()
            self.base = {role: untuned.encode(self.texts, role) for role in roles}
            if all((1 - cosines(self.vectors[role], self.base[role]) < 1e-6).all() for role in roles):
                raise VerificationFailed("weights: the vectors are those of the untuned base, the adapter changes nothing")

    def check_tokens(self, role: str, folder: Path) -> None:
        """Raise VerificationFailed with the name of the part where the folder's tokenizer gives other ids than the contract."""
        ids = ids_of_folder(folder, self.texts)
        own = [s.ids for s in own_sequences(self.encoder, role, self.texts)]
        if ids == own:
            return
        wrong, lengths = np.array([a != b for a, b in zip(ids, own, strict=True)]), text_lengths(self.encoder, self.texts)
        short = lengths <= self.encoder.contract.max_tokens
        for fault, sequences in token_faults(self.encoder, role, self.texts):
            rows = np.flatnonzero(compared_rows(fault, short)).tolist()
            if wrong[rows].any() and all(sequences[row].ids == ids[row] for row in rows):
                break
        else:
            text = self.texts[int(np.flatnonzero(wrong)[0])]
            fault = fault_of_length(wrong, lengths) or f"tokens: {wrong.sum()} texts differ, the first is {text[:60]!r}"
        raise VerificationFailed(f"{role}, tokenizer: {fault}")

    def check(self, role: str, what: str, vectors: np.ndarray, dtype: str) -> Check:
        """A line of the table. Raises VerificationFailed with the name of the part that differs.

        vectors    (N, D); a row of NaN was refused, as only an empty text may be
        dtype      of the exported weights
        """
        refused = np.isnan(vectors).any(1)
        if full := [text for text, is_refused in zip(self.texts, refused.tolist(), strict=True) if is_refused and text.strip()]:
            raise VerificationFailed(f"{role}, {what}: {len(full)} texts are refused, the first is {full[0][:60]!r}")
        truth, kept = self.vectors[role][~refused], vectors[~refused]
        texts = [text for text, is_refused in zip(self.texts, refused.tolist(), strict=True) if not is_refused]
        if truth.shape != kept.shape:
            raise VerificationFailed(f"{role}, {what}: dimensions: {kept.shape[1]} numbers a vector, the contract has {truth.shape[1]}")
        cosine = float(cosines(truth, kept).min())
        lengths = np.linalg.norm(kept, axis=1) / np.maximum(np.linalg.norm(truth, axis=1), 1e-30)
        tolerance = SAME if dtype in EXACT else 1 - MIN_COSINE[dtype]
        if 1 - cosine > tolerance:  # a known fault fails also where it moves vectors little
            base = self.base[role][~refused] if self.base else None
            fault = known_fault(self.encoder, role, texts, kept, base, tolerance)
            if fault or cosine < MIN_COSINE[dtype]:
                fault = fault or where_they_differ(truth, kept, texts, dtype, tolerance)
                raise VerificationFailed(f"{role}, {what}: {fault} (smallest cosine {cosine:.4f}, needs {MIN_COSINE[dtype]})")
        if np.abs(lengths - 1).max() > NORM:
            raise VerificationFailed(f"{role}, {what}: normalization: vectors are {lengths.max():.3g} times as long as the contract's")
        return Check(role, what, cosine, MIN_COSINE[dtype], int(refused.sum()))
