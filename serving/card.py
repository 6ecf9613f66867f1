"""README.md of an exported folder: the model card."""

import json
import shlex
from typing import TYPE_CHECKING

from serving.folder import QUERY_FOLDER, built_in_pooling, token_limit
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
    code = "" if built_in_pooling(encoder.contract, role) else ", trust_remote_code=True"  # for contract_pooling.py
    return f"SentenceTransformer({json.dumps(folder)}{code}).encode(texts)"


CARD = """# {name}

Text embeddings of {width} numbers, {norm}, from {base} ({revision}), fingerprint {fingerprint}. The licence is that of the base and of the
data.

```
{load}
```

{facts}

## Verified

Smallest cosine to the adapter unmerged in float32, over 32 texts of all lengths and scripts; the weights here are {dtype}:

{proof}
"""


def model_card(runtime: str, encoder: "Encoder", role: str, name: str, dtype: str, checks: list["Check"]) -> str:
    """Markdown with the header that the hub reads."""
    contract, prompt = encoder.contract, encoder.contract.prompts[role]
    mode = built_in_pooling(contract, role)
    facts = [f"Text goes in as it is; the tokenizer puts {prompt['prefix']!r} before it and {prompt['suffix']!r} after it."]
    if role == "document" and prompt != contract.prompts["query"]:
        facts.append(f"Queries have another prompt: encode them with the folder `{QUERY_FOLDER}/`.")
    limit = token_limit(encoder, role)
    facts.append(f"A text is cut to {contract.max_tokens} tokens, the prompt never is: together they are {limit} at most.")
    facts.append(f"Pooling: {contract.pooling}" + (f", {mode} of sentence-transformers." if mode else ", by contract_pooling.py."))
    facts.append(f"Trained on: {contract.data['name']} (sha256 {contract.data['sha256'][:16]})." if contract.data else "Not trained.")
    facts.append("`embedding.json` is the contract, `verification.json` the proof with texts and versions.")
    load = how_to_load(runtime, encoder, role, f"{name}/{QUERY_FOLDER}" if role == "query" else name, dtype)
    if runtime == "sentence-transformers":
        load = f"from sentence_transformers import SentenceTransformer\n\nvectors = {load}"
    is_hub_id = contract.base.count("/") == 1 and not contract.revision.startswith("sha256:")
    header = ["---", "library_name: sentence-transformers", "pipeline_tag: feature-extraction"]
    header += [*([f"base_model: {contract.base}"] if is_hub_id else []), "tags:", "- sentence-transformers", "---", "", ""]
    return "\n".join(header) + CARD.format(
        name=name,
        width=encoder.width,
        norm="of norm 1" if contract.normalize else "not normalized",
        base=contract.base,
        revision=contract.revision,
        fingerprint=encoder.fingerprint,
        load=load,
        facts="\n".join(f"* {fact}" for fact in facts),
        dtype=dtype,
        proof="\n".join(f"* {check.line()}" for check in checks) or "* nothing: this folder was not verified",
    )
