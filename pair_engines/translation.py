"""Pairs of a text and its translation into another language and back."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from files.console import InputError, say
from files.docstrings import SENTENCE_END
from files.reading import TextStream, excerpt
from pair_engines.durable import Answer, Failure, Job, durable_rows, in_halves
from pair_engines.inputs import in_shard
from pair_engines.outputs import partial_file


def translated_pairs(args: argparse.Namespace) -> Iterator[dict]:
    """Each text and its back-translation by two Marian models (Sennrich et al. 2016, arXiv 1511.06709), the likeliest tokens of each.

    A text with a sentence that is too long for a model becomes a row with the error.
    """
    names = model_names(args)
    settings = {"models": names, "shard": args.shard}
    return durable_rows(partial_file(args.out), text_jobs(args), settings, "backtranslate", lambda _: load_translators(args, names))


def model_names(args: argparse.Namespace) -> tuple[str, str]:
    """The model that translates into the pivot language, and the one that translates back."""
    return args.to_pivot or f"Helsinki-NLP/opus-mt-en-{args.pivot}", args.from_pivot or f"Helsinki-NLP/opus-mt-{args.pivot}-en"


def text_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Each text of --input; texts are read one at a time. Prints which column was taken."""
    texts = TextStream(args.input, args.column)
    say(f"{texts.name}: texts in {texts.choice}")
    for number, (source, text) in enumerate(itertools.islice(texts, args.limit)):
        if in_shard(args.shard, number):
            yield Job(number, source, text)
    say(texts.summary())


def load_translators(args: argparse.Namespace, names: tuple[str, str]) -> Answer:
    """What answers jobs with back-translations, sentence by sentence. Raises InputError where a model cannot be loaded."""
    there, back = (load_translator(name) for name in names)

    def translate(texts: list[str]) -> list[str]:
        """There and back, sentence by sentence: these models have seen nothing longer."""
        sentences = [[s for line in text.split("\n") for s in SENTENCE_END.split(line) if s.strip()] for text in texts]
        translated = iter(back(there([s for of_text in sentences for s in of_text])))
        return [" ".join(next(translated) for _ in of_text) for of_text in sentences]

    def answer(jobs: list[Job]) -> Iterator[list[tuple[Job, str | Failure]]]:
        order = sorted(jobs, key=lambda job: -len(job.text))
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            yield list(zip(batch, in_halves([job.text for job in batch], translate), strict=True))

    return answer


def load_translator(name: str):
    """A function from texts to their translations by a Marian model."""
    import torch
    from transformers import AutoTokenizer, MarianMTModel

    from encoder.base_models import hub_answers, why_not_loaded
    from encoder.runtime import pick_dtype

    local = {"local_files_only": not (Path(name).is_dir() or hub_answers())}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **local)
        model = MarianMTModel.from_pretrained(name, dtype=pick_dtype(None, device), **local).to(device).eval()
    except ImportError:
        raise InputError(f"the tokenizer of {name} needs the package sentencepiece: pip install sentencepiece") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the translation model {name!r}: {why_not_loaded(name, error)}") from None
    longest = model.config.max_position_embeddings

    def translate(texts: list[str]) -> list[str]:
        inputs = tokenizer(texts, return_tensors="pt", padding=True)  # (B, L)
        if inputs["input_ids"].shape[1] > longest:
            raise RuntimeError(f"a sentence of {inputs['input_ids'].shape[1]} tokens, the model takes {longest}: {excerpt(texts[0])!r}")
        kept = {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            out = model.generate(**kept, num_beams=1, do_sample=False, max_new_tokens=longest - 1)
        return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]

    return translate
