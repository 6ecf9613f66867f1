"""README.md of an exported folder: the model card."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from encoder.contract import SUMMARY_FILE
from encoder.names import is_run
from files.console import InputError
from serving.folder import QUERY_FOLDER, built_in_pooling, token_limit
from serving.gguf_folder import context_tokens, llama_server_flags
from serving.runtimes import vllm_flags

if TYPE_CHECKING:
    from encoder import Encoder
    from serving.verification import Check


def how_to_load(runtime: str, encoder: "Encoder", role: str, folder: str, dtype: str) -> str:
    """The line that loads the folder, or serves it."""
    if runtime == "vllm":
        return shlex.join(["vllm", "serve", folder, *vllm_flags(dtype, token_limit(encoder, role))])
    if runtime == "tei":
        pooling = {"mean": "mean", "lasttoken": "last-token"}[built_in_pooling(encoder.contract, role)]
        return shlex.join(["text-embeddings-router", "--model-id", folder, "--pooling", pooling, "--dtype", dtype, "--auto-truncate"])
    if runtime == "gguf":
        return shlex.join(["llama-server", "-m", f"{folder}/model.gguf", *llama_server_flags(context_tokens(encoder))])
    if runtime == "onnx":
        return f"onnxruntime.InferenceSession({json.dumps(folder + '/model.onnx')}): {folder}/README.md has the lines"
    code = "" if built_in_pooling(encoder.contract, role) else ", trust_remote_code=True"  # for contract_pooling.py
    return f"SentenceTransformer({json.dumps(folder)}{code}).encode(texts)"


SENTENCE_TRANSFORMERS = """from sentence_transformers import SentenceTransformer

vectors = {load}"""

ONNX = """import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("{folder}/tokenizer.json")  # prompt, limit and padding are in it
model = onnxruntime.InferenceSession("{folder}/model.onnx")
encodings = tokenizer.encode_batch(texts)
ids, mask = (np.array([getattr(e, name) for e in encodings], np.int64) for name in ("ids", "attention_mask"))
vectors = model.run(None, {{"input_ids": ids, "attention_mask": mask}})[0]  # float32 (N, {width})"""

GGUF = """from llama_cpp import Llama
from llama_cpp.llama_tokenizer import BaseLlamaTokenizer
from tokenizers import Tokenizer


class FileTokenizer(BaseLlamaTokenizer):
    tokenizer = Tokenizer.from_file("{folder}/tokenizer.json")  # prompt and limit are in it

    def tokenize(self, text, add_bos=True, special=True):
        return self.tokenizer.encode(text.decode()).ids

    def detokenize(self, tokens, prev_tokens=None, special=False):
        return self.tokenizer.decode(tokens).encode()


size = {size}
model = Llama("{folder}/model.gguf", embedding=True, n_ctx=size, n_batch=size, n_ubatch=size, tokenizer=FileTokenizer())
vectors = model.embed(texts, normalize={normalize})

# or from its server: {load}
inputs = [ids.ids for ids in FileTokenizer.tokenizer.encode_batch(texts)]
answer = requests.post("http://localhost:8080{path}", json={body}).json()"""


def code_to_load(runtime: str, encoder: "Encoder", role: str, folder: str, dtype: str) -> str:
    """What the card shows: a command, or lines of Python that make `vectors` of `texts`."""
    load = how_to_load(runtime, encoder, role, folder, dtype)
    if runtime == "sentence-transformers":
        return SENTENCE_TRANSFORMERS.format(load=load)
    if runtime == "onnx":
        return ONNX.format(folder=folder, width=encoder.width)
    if runtime == "gguf":
        normalize = encoder.contract.normalize  # the server always does under the path of OpenAI
        path, body = ("/v1/embeddings", '{"input": inputs}') if normalize else ("/embeddings", '{"content": inputs, "embd_normalize": -1}')
        return GGUF.format(folder=folder, size=context_tokens(encoder), normalize=normalize, load=load, path=path, body=body)
    return load


def licence_of_base(encoder: "Encoder") -> str | None:
    """What the base's own card says, in its folder or on the hub."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    from encoder.base_models import fetch

    source = Path(encoder.source)
    try:
        folder = source if source.is_dir() else fetch(encoder.source, encoder.contract.revision, False, ("README.md",))
        header = metadata_load(folder / "README.md") or {}
    except (InputError, OSError, ValueError, YAMLError):  # no card, or none with a header
        return None
    licence = header.get("license")
    return licence if isinstance(licence, str) else None


def score_facts(model: str) -> list[str]:
    """What the run in a folder is known to score; nothing for a base."""
    try:
        summary = json.loads((Path(model) / SUMMARY_FILE).read_text(encoding="utf-8")) if is_run(model) else {}
    except (OSError, ValueError):  # of a run that has not ended, or damaged: a card may do without
        summary = {}
    facts = []
    if (validation := summary.get("validation")) and validation["kept"] is not None:
        facts.append(f"Validation during training: {validation['what']} {validation['kept']:.3f}.")
    if result := summary.get("without_labels"):
        interval = f"ratio {result['ratio']:.2f}, 95 % interval {result['low']:.2f} to {result['high']:.2f}"
        start = "its base" if result["against"] == "its base" else "the run that training went on with"
        facts.append(f"Against {start}, measured without labels: {result['verdict']} ({interval}).")
    return facts


class About(NamedTuple):
    """What the card says that the encoder does not know."""

    name: str  # of the folder
    runtime: str
    dtype: str  # of the weights
    facts: list[str]  # of the run: its scores
    licence: str | None  # of the base


CARD = """# {name}

Text embeddings of {width} numbers, {norm}, from {base} ({revision}), fingerprint {fingerprint}. {licence}

```
{load}
```

{facts}

## Verified

Smallest cosine to the adapter unmerged in float32, over 32 texts of all lengths and scripts; the weights here are {dtype}:

{proof}
"""
LICENCE, NO_LICENCE = "The base's licence is {}; that of the data comes beside it.", "The licence is that of the base and of the data."


def model_card(about: About, encoder: "Encoder", role: str, checks: list["Check"], notes: list[str]) -> str:
    """Markdown with the header that the hub reads.

    notes    what the verification found of this role
    """
    contract, folder = encoder.contract, f"{about.name}/{QUERY_FOLDER}" if role == "query" else about.name
    is_hub_id = contract.base.count("/") == 1 and not contract.revision.startswith("sha256:")
    library = about.runtime if about.runtime in ("onnx", "gguf") else "sentence-transformers"
    header = ["---", f"library_name: {library}", "pipeline_tag: feature-extraction"]
    header += [f"license: {about.licence}"] * bool(about.licence) + [f"base_model: {contract.base}"] * is_hub_id
    header += ["tags:", f"- {library}", "---", "", ""]
    return "\n".join(header) + CARD.format(
        name=about.name,
        width=encoder.width,
        norm="of norm 1" if contract.normalize else "not normalized",
        base=contract.base,
        revision=contract.revision,
        fingerprint=encoder.fingerprint,
        licence=LICENCE.format(about.licence) if about.licence else NO_LICENCE,
        load=code_to_load(about.runtime, encoder, role, folder, about.dtype),
        facts="\n".join(f"* {fact}" for fact in [*contract_facts(about, encoder, role), *notes]),
        dtype=about.dtype,
        proof="\n".join(f"* {check.line()}" for check in checks) or "* nothing: this folder was not verified",
    )


def contract_facts(about: About, encoder: "Encoder", role: str) -> list[str]:
    contract, prompt = encoder.contract, encoder.contract.prompts[role]
    mode = built_in_pooling(contract, role)
    facts = [f"Text goes in as it is; the tokenizer puts {prompt['prefix']!r} before it and {prompt['suffix']!r} after it."]
    if role == "document" and prompt != contract.prompts["query"]:
        facts.append(f"Queries have another prompt: encode them with the folder `{QUERY_FOLDER}/`.")
    limit = token_limit(encoder, role)
    facts.append(f"A text is cut to {contract.max_tokens} tokens, the prompt never is: together they are {limit} at most.")
    where = f", {mode} of sentence-transformers" if mode else ", by contract_pooling.py"
    where = {"onnx": ", inside the model", "gguf": ", named in the file's metadata"}.get(about.runtime, where)
    facts.append(f"Pooling: {contract.pooling}, scope {contract.scope}{where}.")
    facts.append(f"Trained on: {contract.data['name']} (sha256 {contract.data['sha256'][:16]})." if contract.data else "Not trained.")
    return [*facts, *about.facts, "`embedding.json` is the contract, `verification.json` the proof with texts and versions."]
