"""One role of an embedding contract as a folder that sentence-transformers, vLLM and TEI read, and which contract a runtime can express.

    config.json, model.safetensors           the base with the adapter added to it
    tokenizer.json, tokenizer_config.json    BOS, prompt and EOS as the template around every text, which no truncation reaches
    modules.json, 1_Pooling/, ...            pooling, dimensions and normalization, one module after another
    sentence_bert_config.json                text alone, no chat template; the limit of text and prompt together
    embedding.json                           the contract itself

Where queries have another prompt than documents, the folder `query/` inside is the same with the other tokenizer; its weights are
hard links.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from encoder.contract import CONTRACT_FILE, Contract
from files.console import InputError
from files.writing import write_atomic, write_json, write_text

if TYPE_CHECKING:
    from encoder import Encoder

TYPES = "sentence_transformers.models."  # the names that all versions of sentence-transformers, and vLLM, know
QUERY_FOLDER = "query"
CODE = "contract_pooling"  # the module file that sentence-transformers loads with trust_remote_code
# our pooling -> that of sentence-transformers, over all tokens of the sequence
BUILT_IN = {"mean": "mean", "last": "lasttoken", "position-mean": "weightedmean"}
# runtime -> the poolings of sentence-transformers that it has; None stands for ContractPooling
RUNTIMES = {
    "sentence-transformers": ("mean", "lasttoken", "weightedmean", None),
    "vllm": ("mean", "lasttoken"),
    "tei": ("mean", "lasttoken"),
    "onnx": ("mean", "lasttoken", "weightedmean", None),
    "gguf": ("mean", "lasttoken"),
}


class ModuleOfFolder(NamedTuple):
    name: str
    type: str
    config: dict


def built_in_pooling(contract: Contract, role: str = "document") -> str | None:
    """The pooling of sentence-transformers that is this contract's, or None where it leaves out tokens that the contract does not."""
    prompt = contract.prompts[role]
    bare = not (contract.eos or prompt["suffix"])
    if contract.pooling == "last":
        every_token = contract.scope == "all" or bare
    elif contract.scope == "all":
        every_token = contract.keep_bos or not contract.bos
    else:
        every_token = bare and not (contract.bos or prompt["prefix"])
    return BUILT_IN[contract.pooling] if every_token else None


def obstacle(contract: Contract, runtime: str) -> tuple[str, str] | None:
    """What of a contract a runtime cannot express, and what it has instead; None where it can express all."""
    if contract.pooling not in BUILT_IN:
        return f"pooling {contract.pooling}", f"poolings {', '.join(BUILT_IN)}"
    if contract.layers != (-1,):
        return f"layers {', '.join(map(str, contract.layers))}", "the last layer (-1)"
    if contract.attention != "causal":
        return f"{contract.attention} attention", "causal attention"
    if any(len(contract.prompts_of(role)) > 1 for role in contract.prompts):
        return "the mean of several prompts", "one prompt"
    if contract.token_prepending is not None:
        return "token_prepending", "every token's own states"
    if contract.mean_removed is not None:
        return "vectors whose mean is removed", "vectors as they are pooled"
    if any("middle" in prompt for prompt in contract.prompts.values()):
        return "a prompt that holds the text twice", "prompts around one text"
    if contract.embed_filter is not None:
        return "an embed_filter", "vectors as they are pooled"
    if contract.quantize:
        return f"a base in {contract.quantize}, to whose weights no adapter can be added", "runs on a base that is not quantized"
    if runtime == "gguf" and contract.dims is not None:  # llama.cpp gives every number of a state
        return f"vectors cut to {contract.dims} numbers", "whole vectors"
    for role in contract.prompts:
        pooling = built_in_pooling(contract, role)
        if pooling not in RUNTIMES[runtime]:
            known = [ours for ours, theirs in BUILT_IN.items() if theirs in RUNTIMES[runtime]]
            left_out = "" if pooling else " over some of the tokens"
            return f"pooling {contract.pooling}{left_out}", f"{' and '.join(sorted(known))} over all tokens"
    return None


def runtimes_for(contract: Contract) -> list[str]:
    return [name for name in RUNTIMES if not obstacle(contract, name)]


def check_expressible(contract: Contract, runtime: str) -> None:
    """Raise InputError for a contract that this runtime cannot express, with what it can."""
    if found := obstacle(contract, runtime):
        others = runtimes_for(contract)
        advice = f"; {' and '.join(others)} can serve it" if others else ""
        raise InputError(f"{runtime} cannot serve {found[0]}: it has {found[1]}{advice}")


def serving_note(contract: Contract) -> str:
    """A line that says which runtimes can serve the contract."""
    can = runtimes_for(contract)
    cannot = [name for name in RUNTIMES if name not in can]
    if not can:
        return "no serving runtime has this contract's pooling: its vectors come from this tool alone"
    return f"can be exported to {', '.join(can)}" + (f", not to {', '.join(cannot)}" if cannot else "")


def pooling_modules(contract: Contract, role: str, width: int, prompt_ids: tuple[list[int], list[int]]) -> list[ModuleOfFolder]:
    """What comes after the model: pooling, then dimensions, then normalization.

    width         numbers of a state
    prompt_ids    ids before the text (BOS and prefix) and after it (suffix and EOS)
    """
    mode = built_in_pooling(contract, role)
    if mode:
        legacy = {"mean": "mean_tokens", "lasttoken": "lasttoken", "weightedmean": "weightedmean_tokens"}
        flags = {f"pooling_mode_{name}": legacy[mode] == name for name in ("cls_token", "max_tokens", *legacy.values())}
        config = {"word_embedding_dimension": width, **flags, "include_prompt": True}
        modules = [ModuleOfFolder("1_Pooling", f"{TYPES}Pooling", config)]
    else:
        config = {
            "embedding_dimension": width,
            "pooling": contract.pooling,
            "scope": contract.scope,
            "skip_bos": contract.bos and not contract.keep_bos,
            "n_before": len(prompt_ids[0]),
            "n_after": len(prompt_ids[1]),
        }
        modules = [ModuleOfFolder("1_Pooling", f"{CODE}.ContractPooling", config)]
    if contract.dims is not None and contract.dims < width:
        identity = {"activation_function": "torch.nn.modules.linear.Identity", "bias": False}
        modules.append(ModuleOfFolder("2_Dense", f"{TYPES}Dense", {"in_features": width, "out_features": contract.dims, **identity}))
    if contract.normalize:
        modules.append(ModuleOfFolder(f"{len(modules) + 1}_Normalize", f"{TYPES}Normalize", {}))
    return modules


def templated_tokenizer(encoder: "Encoder", role: str):
    """A copy of the tokenizer with BOS, prompt and EOS of a role as its template."""
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer, (before, after) = copy.deepcopy(encoder.tokenizer), encoder.prompt_tokenizer.around(role)
    names = {name: ids for name, ids in (("<before>", before), ("<after>", after)) if ids}
    template = " ".join([*(["<before>"] if before else []), "$A", *(["<after>"] if after else [])])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template,
        pair=f"{template} $B:1",
        special_tokens=[{"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in names.items()],
    )
    limit = token_limit(encoder, role)
    tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side, tokenizer.chat_template = limit, "right", "right", None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def write_tokenizer_file(encoder: "Encoder", role: str, folder: Path, *, pad: bool) -> None:
    """Write tokenizer.json alone, for the package `tokenizers`: template, limit and, with `pad`, the padding of a batch."""
    tokenizer = templated_tokenizer(encoder, role)
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(token_limit(encoder, role))
    if pad:  # without a token for it, any will do: the mask says what it is
        backend.enable_padding(pad_id=tokenizer.pad_token_id or 0, pad_token=tokenizer.pad_token or "")
    write_atomic(folder / "tokenizer.json", lambda path: backend.save(str(path)))


def write_tokenizer(encoder: "Encoder", role: str, folder: Path) -> None:
    """Write the tokenizer of a role as transformers reads it."""
    templated_tokenizer(encoder, role).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # a class of its own (LlamaTokenizer, ...) would put its template in place of this one
    config |= {"tokenizer_class": "TokenizersBackend", "model_max_length": token_limit(encoder, role)}
    write_json(path, {name: value for name, value in config.items() if name not in ("add_bos_token", "add_eos_token", "chat_template")})


def write_modules(encoder: "Encoder", role: str, folder: Path) -> None:
    """Write what sentence-transformers reads beside model and tokenizer."""
    from safetensors.torch import save_file
    from torch import eye

    width, contract = encoder.decoder.config.hidden_size, encoder.contract
    modules = pooling_modules(contract, role, width, encoder.prompt_tokenizer.around(role))
    index = [{"idx": 0, "name": "0", "path": "", "type": f"{TYPES}Transformer"}]
    for number, module in enumerate(modules, 1):
        index.append({"idx": number, "name": str(number), "path": module.name, "type": module.type})
        (folder / module.name).mkdir()
        if module.config:
            write_json(folder / module.name / "config.json", module.config)
        if module.name.endswith("Dense"):
            save_file({"linear.weight": eye(contract.dims, width)}, folder / module.name / "model.safetensors")
        if module.type.startswith(CODE):
            shutil.copy(Path(__file__).with_name(f"{CODE}.py"), folder / f"{CODE}.py")
    write_json(folder / "modules.json", index)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    settings = {"max_seq_length": token_limit(encoder, role), "do_lower_case": False}
    write_json(
        folder / "sentence_bert_config.json", settings | {"modality_config": {"text": text}, "module_output_name": "token_embeddings"}
    )
    about = {"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", about)
    write_text(folder / CONTRACT_FILE, contract.to_json())


def roles_of(contract: Contract) -> list[str]:
    """The roles that need a folder of their own."""
    return ["document"] if contract.prompts["query"] == contract.prompts["document"] else ["document", "query"]


def token_limit(encoder: "Encoder", role: str) -> int:
    """The most tokens of a sequence: the longest text with BOS, prompt and EOS."""
    return encoder.contract.max_tokens + sum(map(len, encoder.prompt_tokenizer.around(role)))


def write_weights(encoder: "Encoder", folder: Path, dtype: str) -> None:
    """Write the decoder, whose adapter is merged and then taken out of it, in another dtype than it has in memory."""
    import torch

    if encoder.peft is not None:
        encoder.peft.unload()
    weights = {name: w.to(getattr(torch, dtype)) if w.is_floating_point() else w for name, w in encoder.decoder.state_dict().items()}
    encoder.decoder.save_pretrained(folder, state_dict=weights)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": dtype})


def folders_of(contract: Contract, folder: Path) -> list[tuple[str, Path]]:
    """Each role that needs a folder, and that folder."""
    return [(role, folder / QUERY_FOLDER if role == "query" else folder) for role in roles_of(contract)]


def write_folder(encoder: "Encoder", folder: Path, dtype: str) -> list[tuple[str, Path]]:
    """Write the folder of an encoder whose adapter is merged, and of its queries where they differ -> each role and its folder.

    dtype    of the weights on disk
    """
    folders = folders_of(encoder.contract, folder)
    for role, path in folders:
        path.mkdir(parents=True)
        if role == "document":
            write_weights(encoder, path, dtype)
        else:
            for weights in folder.glob("model*.safetensors*"):
                os.link(weights, path / weights.name)
            shutil.copy(folder / "config.json", path)
        write_tokenizer(encoder, role, path)
        write_modules(encoder, role, path)
    return folders
