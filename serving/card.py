"""README.md of an exported folder: the model card."""

import json
import shlex
from typing import TYPE_CHECKING

from serving.folder import BUILT_IN, QUERY_FOLDER, built_in_pooling, token_limit
from serving.runtimes import vllm_command

if TYPE_CHECKING:
    from encoder import Encoder
    from serving.verification import Check


def how_to_load(runtime: str, encoder: "Encoder", role: str, folder: str, dtype: str) -> str:
    """The line that loads the folder, or serves it."""
    if runtime == "vllm":
        return shlex.join(["vllm", *vllm_command(folder, dtype, token_limit(encoder, role))])
    if runtime == "tei":
        pooling = {"mean": "mean", "lasttoken": "last-token"}[built_in_pooling(encoder.contract, role)]
        return shlex.join(["text-embeddings-router", "--model-id", folder, "--pooling", pooling, "--dtype", dtype, "--auto-truncate"])
    code = "" if built_in_pooling(encoder.contract, role) else ", trust_remote_code=True"  # for contract_pooling.py
    return f"SentenceTransformer({json.dumps(folder)}{code}).encode(texts)"


def model_card(runtime: str, encoder: "Encoder", role: str, name: str, dtype: str, checks: list["Check"]) -> str:
    """Markdown with the header that the hub reads."""
    contract = encoder.contract
    prompt = contract.prompts[role]
    folder = f"{name}/{QUERY_FOLDER}" if role == "query" else name
    data = f"{contract.data['name']} (sha256 {contract.data['sha256'][:16]})" if contract.data else "none: an untuned base"
    is_hub_id = contract.base.count("/") == 1 and not contract.revision.startswith("sha256:")
    header = ["---", "library_name: sentence-transformers", "pipeline_tag: feature-extraction"]
    header += [f"base_model: {contract.base}"] if is_hub_id else []
    header += ["tags:", "- sentence-transformers", "- feature-extraction", "---"]
    pooling = built_in_pooling(contract, role) or f"{contract.pooling} by contract_pooling.py, over the tokens that the contract names"
    load = how_to_load(runtime, encoder, role, folder, dtype)
    proof = [f"* {check.line()}" for check in checks] or ["* nothing: this folder was not verified"]
    return "\n".join(
        [
            *header,
            "",
            f"# {name}",
            "",
            f"Text embeddings of {encoder.width} numbers, {'of norm 1' if contract.normalize else 'not normalized'}, from "
            f"{contract.base} ({contract.revision}), fingerprint {encoder.fingerprint}. The licence is that of the base and of the data.",
            "",
            "```python" if runtime == "sentence-transformers" else "```",
            *(["from sentence_transformers import SentenceTransformer", ""] if runtime == "sentence-transformers" else []),
            f"vectors = {load}" if runtime == "sentence-transformers" else load,
            "```",
            "",
            f"* Text goes in as it is: the prompt is part of the tokenizer: {prompt['prefix']!r} before it, {prompt['suffix']!r} after it.",
            *([f"* Queries have another prompt: encode them with the folder `{QUERY_FOLDER}/`."] if role == "document" and prompt != contract.prompts["query"] else []),
            f"* A text is cut to {contract.max_tokens} tokens, the prompt never is; with it there are at most {token_limit(encoder, role)}.",
            f"* Pooling: {contract.pooling} ({BUILT_IN[contract.pooling] if pooling in BUILT_IN.values() else pooling}).",
            f"* Trained on: {data}.",
            "* `embedding.json` is the contract, `verification.json` the proof with texts and versions.",
            "",
            "## Verified",
            "",
            f"Smallest cosine to the adapter unmerged in float32, over 32 texts of all lengths and scripts; the weights here are {dtype}:",
            "",
            *proof,
            "",
        ]
    )
