"""Classes of decoders beside those of conftest.py: against transformers' own forward pass, their adapters, and what is refused."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import test_encoder
import test_packing
import torch
from conftest import SMALL, TEXTS, make_tokenizer, randomize_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaConfig

from encoder import Encoder, PoolingConfig
from encoder.base_models import PACKED_TYPES, check_base, find_blocks
from encoder.contract import SCOPES
from files.console import InputError
from training.gradients import fall_back_after_out_of_memory

GQA = {"num_key_value_heads": 2, "intermediate_size": 48}
HEADS = GQA | {"head_dim": 8}
TOP2 = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
MAMBA2 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
# small configs by type; sliding windows are shorter than the longest text
CONFIGS = {
    "apertus": GQA,
    "arcee": GQA,
    "biogpt": {"intermediate_size": 48},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": GQA | {"use_qk_norm": True},
    "cohere2": GQA | {"sliding_window": 12},
    "ctrl": {"dff": 48},
    "deepseek_v2": MLA | TOP2 | {"intermediate_size": 48, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v3": MLA | TOP2 | {"intermediate_size": 48, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5": GQA,
    "exaone4": GQA | {"sliding_window": 12},
    "falcon": {},
    "falcon-alibi": {"model_type": "falcon", "alibi": True, "multi_query": False},
    "gemma": HEADS,
    "gemma2": HEADS | {"sliding_window": 12, "query_pre_attn_scalar": 8},
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": HEADS | TOP2 | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 12},
    "gpt_oss": HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
    "gptj": {"rotary_dim": 4},
    "granite": GQA | {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.3},
    "granitemoe": GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": HEADS,
    "ministral": HEADS | {"sliding_window": 12},
    "ministral3": HEADS,
    "mixtral": GQA | {"num_local_experts": 4, "sliding_window": 12},
    "mpt": {},
    "nemotron": HEADS,
    "olmo": GQA | {"clip_qkv": 0.5},
    "olmo2": GQA,
    "olmo3": GQA | {"sliding_window": 12},
    "olmoe": GQA | {"num_experts": 4, "num_experts_per_tok": 2},
    "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {"intermediate_size": 48},
    "phi": GQA | {"qk_layernorm": True},
    "phi3": GQA | {"sliding_window": 12},
    "phimoe": GQA | {"num_local_experts": 4},
    "qwen2": GQA | WINDOW,
    "qwen2_moe": GQA | WINDOW | TOP2 | {"shared_expert_intermediate_size": 16, "num_experts": 4},
    "qwen3_5_text": HEADS | DELTA | MIXED,
    "qwen3_moe": HEADS | WINDOW | TOP2 | {"num_experts": 4},
    "qwen3_next": HEADS | TOP2 | DELTA | MIXED | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "seed_oss": HEADS,
    "smollm3": GQA | WINDOW | {"no_rope_layers": [1, 0, 1]},
    "stablelm": GQA,
    "starcoder2": GQA | {"sliding_window": 12},
    "xglm": {"ffn_dim": 48},
}
# state-space models: their kernels read the weights of linear layers directly, so that they have no adapter
UNTRAINED = {
    "falcon_h1": HEADS | MAMBA2,
    "falcon_mamba": {"state_size": 8},
    "jamba": GQA | {"mamba_d_state": 8},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
}
POOLINGS = [
    PoolingConfig(pooling, scope, layers)
    for pooling, scope in zip(("mean", "last", "position-mean", "query", "max", "last+mean"), SCOPES * 3, strict=True)
    for layers in ((-1,), (2,), (0, -2))
]
OF_ATTENTION = [PoolingConfig("attention", scope) for scope in SCOPES]


def make(folder, name: str, **changes) -> str:
    extra = (CONFIGS | UNTRAINED).get(name, {})
    settings = SMALL | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | extra | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type", name), **settings))
    with torch.no_grad():  # larger weights than at a usual start: differences between paths must show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    make_tokenizer("bytes", bos=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each small model, made when it is first asked for."""
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, make(tmp_path_factory.mktemp("padded") / name, name))


def plain(model, encoder: Encoder, text: str, query: torch.Tensor, poolings: list[PoolingConfig]) -> list[np.ndarray]:
    """One text through transformers alone, without padding, the poolings written out: what `encode` must equal."""
    tokenized = encoder.tokenize([text])
    ids, (start, end) = tokenized.ids[0], tokenized.spans[0]
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True, output_attentions=encoder.packed, use_cache=False)
    hidden = out.hidden_states
    if "mamba" in encoder.decoder.config.model_type:  # whose own list begins behind the first block
        hidden = model.get_input_embeddings()(torch.tensor([ids])).detach(), *hidden
    states = {0: hidden[0], 2: hidden[2], -1: out.last_hidden_state, -2: hidden[len(encoder.blocks) - 1]}
    vectors = []
    for config in poolings:
        scope = slice(start, end) if config.scope == "text" and end > start else slice(1, None)  # without BOS
        x = torch.stack([states[i][0] for i in config.layers]).double().mean(0)[scope]
        weights = {
            "mean": torch.ones(len(x)).double(),
            "last": (torch.arange(len(x)) == len(x) - 1).double(),
            "position-mean": torch.arange(1, len(x) + 1).double(),
            "query": (x @ query / x.shape[1] ** 0.5).softmax(0),
        }
        if config.pooling == "attention":
            heads = out.attentions[-1][0, :, -1, scope].double()
            weights["attention"] = (heads / heads.sum(1, keepdim=True)).mean(0)
        if config.pooling == "max":
            y = x.max(0).values
        elif config.pooling == "last+mean":
            y = torch.cat([v / v.norm() for v in (weights["last"] @ x, weights["mean"] @ x)])
        else:
            y = weights[config.pooling] @ x
        vectors.append((y / y.norm()).numpy())
    return vectors


@pytest.mark.parametrize("name", [*CONFIGS, *UNTRAINED])
def test_vectors_are_those_of_transformers_alone_and_in_a_batch(name, folders):
    encoder = Encoder.load(folders(name), prompt="cluster", max_tokens=30)
    query = encoder.query.data.normal_(generator=torch.Generator().manual_seed(0))[0].double()
    attention = "sdpa" if name == "falcon-alibi" else "eager"  # where transformers 5.23 adds its biases twice
    model = AutoModel.from_pretrained(folders(name), attn_implementation=attention).eval()
    poolings = POOLINGS + OF_ATTENTION * encoder.packed
    expected = zip(*(plain(model, encoder, text, query, poolings) for text in TEXTS), strict=True)
    alone = [np.concatenate(vectors) for vectors in zip(*(encoder.encode([t], poolings=poolings) for t in TEXTS), strict=True)]
    together = encoder.encode(TEXTS, poolings=poolings)
    for config, a, b, c in zip(poolings, expected, alone, together, strict=True):
        np.testing.assert_allclose(b, np.stack(a), atol=1e-5, err_msg=str(config))
        np.testing.assert_allclose(c, b, atol=1e-5, err_msg=str(config))
    assert np.abs(together[0] - together[1]).max() > 1e-2  # another layer is another vector
    padded = f"{encoder.decoder.config.model_type} models are not packed: texts are padded, which is slower"
    assert encoder.notes == ([] if name in PACKED_TYPES else [padded])


# the tests of packed rows that decide, on the classes that conftest.py leaves out to save time
DECISIVE = {
    "bidirectional": lambda folder, _: test_encoder.test_bidirectional_vectors_are_those_that_transformers_gives(folder),
    "trimmed": lambda folder, patch: test_packing.test_a_trimmed_last_layer_changes_nothing(folder, test_packing.LONG, "causal", patch),
    "gradients": lambda folder, patch: test_packing.test_gradients_flow_through_the_shared_prefix(folder, "last", "stacked", patch),
}


@pytest.mark.parametrize("check", DECISIVE)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name in PACKED_TYPES])
def test_packed_rows_of_every_class(name, check, folders, monkeypatch):
    DECISIVE[check](folders(name), monkeypatch)


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    batch = encoder.collate(encoder.tokenize(TEXTS), list(range(len(TEXTS))))
    torch.manual_seed(0)  # some classes have dropout
    (encoder.embed(batch)[0] @ torch.linspace(-1, 1, 32)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.trainable().items() if p.grad is not None}
    encoder.decoder.zero_grad()
    return gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_the_adapter_of_every_class(name, folders, tmp_path):
    """It reaches every linear layer, is trained, saved and merged; layers computed again have the same gradients."""
    encoder = Encoder.load(folders(name), prompt="cluster", max_tokens=30)
    base = encoder.encode(TEXTS)
    linear = [n for n, m in encoder.blocks.named_modules() if type(m).__name__ in ("Linear", "FalconLinear", "Conv1D")]
    encoder.add_adapter(2)
    encoder.trim_last_layer = False  # layers that are computed again are not trimmed, and would draw other dropout
    adapted = {n.split(".lora_")[0] for n, _ in encoder.blocks.named_parameters() if ".lora_A" in n}
    assert adapted == set(linear) and len(linear) >= 3 * 4 and len(encoder.trainable()) == 2 * len(linear)
    assert encoder.peft.peft_config["default"].fan_in_fan_out == (name in ("gpt2", "openai-gpt"))
    has_experts = any(p.dim() == 3 and n.endswith("_proj") for n, p in encoder.blocks.named_parameters())
    assert has_experts == any("LoRA reaches linear layers only" in note and ".experts" in note for note in encoder.notes)

    torch.manual_seed(0)
    randomize_adapter(encoder, 0.05)
    encoder.decoder.train()
    whole = gradients(encoder)
    assert set(whole) == set(encoder.trainable()) and min(g.abs().max() for g in whole.values()) > 0
    if encoder.decoder.supports_gradient_checkpointing:
        encoder.set_gradient_checkpointing(1)
        for parameter, gradient in gradients(encoder).items():
            torch.testing.assert_close(gradient, whole[parameter], rtol=1e-4, atol=1e-6)
    else:
        with pytest.raises(InputError, match="has no gradient checkpointing"):
            encoder.set_gradient_checkpointing(1)
    before = encoder.encode(TEXTS)
    for parameter, weight in encoder.trainable().items():
        weight.data -= 0.05 * whole[parameter].sign()
    trained = encoder.encode(TEXTS)
    assert np.abs(before - base).max() > 1e-3 and np.abs(trained - before).max() > 1e-3

    encoder.save(tmp_path)
    again = Encoder.load(str(tmp_path))
    np.testing.assert_allclose(again.encode(TEXTS), trained, atol=1e-6)
    np.testing.assert_allclose(again.untuned().encode(TEXTS), base, atol=1e-6)
    assert again.merge() < 1e-6 and again.merged
    np.testing.assert_allclose(again.encode(TEXTS), trained, atol=1e-5)


def test_out_of_memory_halves_the_chunk_where_layers_cannot_be_computed_again(folders):
    state = SimpleNamespace(gradient_checkpointing=0, chunk_size=8)
    fall_back_after_out_of_memory(Encoder.load(folders("openai-gpt")), state, 8)
    assert (state.gradient_checkpointing, state.chunk_size) == (0, 4)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_state_space_layers_are_not_trained(folders):
    """On a GPU their kernels take the weights of linear layers, and the adapter would have no part in the vectors."""
    for name in UNTRAINED:
        encoder = Encoder.load(folders(name))
        with pytest.raises(InputError, match="reads weights of linear layers past an adapter: it cannot be trained"):
            encoder.add_adapter(2)


def test_states_of_another_width_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"of type 'opt': its states have \(16,\) numbers instead of 32"):
        Encoder.load(make(tmp_path / "model", "opt", word_embed_proj_dim=16))


def test_a_model_that_reads_ahead_or_sees_padding_is_refused(folders, monkeypatch):
    """Its class says that it is a decoder, and only its states say otherwise."""

    def all_visible(config, inputs_embeds, **_):
        return torch.zeros(len(inputs_embeds), 1, *[inputs_embeds.shape[1]] * 2)

    monkeypatch.setattr("transformers.models.stablelm.modeling_stablelm.create_causal_mask", all_visible)
    with pytest.raises(InputError, match="of type 'stablelm': its states change with the tokens behind them, or with padding"):
        Encoder.load(folders("stablelm"))


def test_damaged_weights_are_not_taken_for_another_class(folders, tmp_path):
    folder = shutil.copytree(folders("gpt2"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"] *= torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="are the weights damaged"):
        Encoder.load(str(folder)).encode(["a"])


def test_what_fails_in_its_forward_pass_is_refused(folders, monkeypatch):
    def fail(*_, **__):
        raise TypeError("forward() got an unexpected keyword argument")

    monkeypatch.setattr("transformers.GPT2Model.forward", fail)
    with pytest.raises(InputError, match="of type 'gpt2', cannot be run here: forward"):
        Encoder.load(folders("gpt2"))


def test_the_config_shows_early_what_cannot_be_loaded(folders, tmp_path):
    for name in ("gpt2", "mixtral", "mamba", "opt"):
        check_base(folders(name), False)
    folder = shutil.copytree(folders("gpt2"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights in safetensors files"):
        check_base(str(folder), False)
    LlavaConfig().save_pretrained(folder)
    with pytest.raises(InputError, match="of type 'llava', no decoder"):
        check_base(str(folder), False)
    (folder / "config.json").write_text('{"model_type": "of-tomorrow"}')
    with pytest.raises(InputError, match="does not hold a whole model"):
        check_base(str(folder), False)


def test_blocks_are_the_one_list_with_a_module_for_each_layer():
    def model(**lists):
        module = torch.nn.Module()
        module.config, module.inner = SimpleNamespace(num_hidden_layers=2), torch.nn.Module()
        for name, modules in lists.items():
            setattr(module.inner, name, torch.nn.ModuleList(modules))
        return module

    def some(n):
        return [torch.nn.Identity() for _ in range(n)]

    blocks = [torch.nn.ModuleDict({"experts": torch.nn.ModuleList(some(2))}) for _ in range(2)]
    simple = model(h=blocks, heads=some(3))
    assert find_blocks(simple) is simple.inner.h
    assert find_blocks(model(h=blocks, norms=some(2))) is None and find_blocks(model(h=some(3))) is None
