"""Token prepending: against transformers' own forward pass, text by text, and what is refused."""

import json

import numpy as np
import pytest
import test_classes
import torch
from conftest import TEXTS, make_run
from transformers import AutoModel

from encoder import Encoder, PoolingConfig
from encoder.base_models import find_blocks
from encoder.contract import SCOPES
from encoder.token_prepending import replaced_layers
from files.console import InputError

POOLINGS = [PoolingConfig(pooling, scope) for pooling in ("last", "mean", "position-mean") for scope in SCOPES]
POOLINGS += [PoolingConfig("last", "all", (1,)), PoolingConfig("mean", "text", (2,)), PoolingConfig("mean", "all", (0, -2))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, test_classes.make(tmp_path_factory.mktemp("prepended") / name, name))


def plain(model, encoder: Encoder, layers: range, text: str) -> list[np.ndarray]:
    """One text through transformers alone, the placeholder's state overwritten by the last token's between its layers."""
    tokenizer, contract = encoder.tokenizer, encoder.contract
    prompt = contract.prompts["document"]
    prefix, inside, suffix = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt["prefix"], text, prompt["suffix"]))
    before, rest = [tokenizer.bos_token_id] * contract.bos + prefix, inside[: contract.max_tokens] + suffix
    at = len(before) - prompt["prefix"].endswith('"')
    ids = before[:at] + (before + rest)[-1:] + before[at:] + rest
    states = {}

    def replace(number):
        def hook(_, args, kwargs):
            state = args[0] if args else kwargs["hidden_states"]
            states[number] = state[0].clone()
            if number in layers:
                state[0, at] = state[0, -1]

        return hook

    hooks = [block.register_forward_pre_hook(replace(k), with_kwargs=True) for k, block in enumerate(find_blocks(model))]
    with torch.no_grad():
        states[-1] = model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    states[-2] = states[len(hooks) - 1]
    start, vectors = len(before) + 1, []
    for config in POOLINGS:
        scope = slice(start, start + len(rest) - len(suffix)) if config.scope == "text" and len(rest) > len(suffix) else slice(1, None)
        x = torch.stack([states[i] for i in config.layers]).double().mean(0)[scope]
        weights = torch.arange(1, len(x) + 1).double() if config.pooling == "position-mean" else torch.ones(len(x)).double()
        y = x[-1] if config.pooling == "last" else weights @ x
        vectors.append((y / y.norm()).numpy())
    return vectors


CLASSES = [*test_classes.CONFIGS, *test_classes.UNTRAINED]


@pytest.mark.parametrize("name", CLASSES)
def test_vectors_are_those_of_transformers_alone_and_in_a_batch(name, folders):
    encoder = Encoder.load(folders(name), prompt="cluster", max_tokens=30, token_prepending=(1, 2))
    check(encoder, folders(name), range(1, 3), "sdpa" if name == "falcon-alibi" else "eager")


def check(encoder: Encoder, folder: str, layers: range, attention: str = "eager") -> None:
    model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    expected = [np.stack(of) for of in zip(*(plain(model, encoder, layers, text) for text in TEXTS), strict=True)]
    alone = [np.concatenate(of) for of in zip(*(encoder.encode([text], poolings=POOLINGS) for text in TEXTS), strict=True)]
    together = encoder.encode(TEXTS, poolings=POOLINGS)
    (last,) = encoder.encode(TEXTS, poolings=POOLINGS[:1])  # with a trimmed last layer
    for config, a, b, c in zip(POOLINGS, expected, alone, together, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=str(config))
        np.testing.assert_allclose(c, b, atol=1e-5, err_msg=str(config))
    np.testing.assert_allclose(last, alone[0], atol=1e-5)
    without = encoder.with_contract(token_prepending=None).encode(TEXTS, poolings=POOLINGS)
    assert max(np.abs(a - b).max() for a, b in zip(together, without, strict=True)) > 1e-3


@pytest.mark.parametrize("ends, layers", [((1, 1), range(1, 2)), ((2, 2), range(2, 3)), ((1, "70%"), range(1, 3)), ((-3, -2), range(1, 3))])
def test_the_range_of_layers(model, ends, layers):
    check(Encoder.load(model, prompt="cluster", token_prepending=ends, bos=True), model, layers)


def test_the_bundled_model():
    encoder = Encoder.load("tiny", prompt="cluster", token_prepending=(1, "20%"))
    check(encoder, encoder.source, range(1, 2))
    long = [" ".join(TEXTS)] * 2 + TEXTS  # in small batches as well, and whatever computes attention
    whole = encoder.encode(long)
    np.testing.assert_allclose(encoder.encode(long, batch_tokens=60), whole, atol=1e-5)
    encoder.share_prefix = encoder.trim_last_layer = False
    np.testing.assert_allclose(encoder.encode(long), whole, atol=1e-5)


@pytest.mark.parametrize("prompt", ["none", "echo", "{text}", "a {text}"])
def test_texts_without_a_suffix_and_texts_twice(llama, prompt):
    for bos in (True, False):
        encoder = Encoder.load(llama, prompt=prompt, pooling="mean", bos=bos, token_prepending=(1, 2))
        tokenized = encoder.tokenize(TEXTS)
        for text, ids, (start, end) in zip(TEXTS, tokenized.ids, tokenized.spans, strict=True):
            if not ids:
                continue
            assert ids[tokenized.placeholder] == ids[-1] and tokenized.placeholder == tokenized.prefix_length
            assert ids[start:end] == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
        np.testing.assert_allclose(encoder.encode(TEXTS), alone, atol=1e-5)
        assert bos or prompt != "none" or not alone[-1].any()  # nothing to embed


def test_the_placeholder_stands_before_the_quotation_mark(llama):
    decode = Encoder.load(llama).tokenizer.decode
    for prompt, before in (('say "{text}" ok:', "say"), ("say «{text}» ok:", "say"), ("say {text} ok:", "say"), ("{text} ok:", "")):
        encoder = Encoder.load(llama, prompt=prompt, bos=False, token_prepending=(1, 2))
        plain, tokenized = encoder.with_contract(token_prepending=None).tokenize(["cat"]), encoder.tokenize(["cat"])
        at, ids = tokenized.placeholder, tokenized.ids[0]
        assert ids[:at] + ids[at + 1 :] == plain.ids[0] and ids[at] == ids[-1] and at == tokenized.prefix_length
        assert decode(ids[:at]).strip() == before
        assert tokenized.spans[0] == tuple(place + 1 for place in plain.spans[0])


def test_it_is_part_of_the_contract(llama, tmp_path):
    encoder = Encoder.load(llama, prompt="cluster", token_prepending=(1, "70%"))
    assert json.loads(encoder.contract.to_json())["token_prepending"] == [1, "70%"]
    assert type(encoder.contract).from_json(encoder.contract.to_json()) == encoder.contract
    others = [Encoder.load(llama, prompt="cluster", token_prepending=ends) for ends in (None, (1, 1))]
    assert len({encoder.fingerprint, *(other.fingerprint for other in others)}) == 3
    run = make_run(llama, tmp_path / "run", prompt="cluster")
    with pytest.raises(InputError, match=r"token_prepending is None in the run, \(1, 2\) was asked for"):
        Encoder.load(run, token_prepending=(1, 2))
    changed = Encoder.load(run, token_prepending=(1, 2), override_contract=True)
    changed.save(tmp_path / "again")
    again = Encoder.load(str(tmp_path / "again"))
    np.testing.assert_array_equal(again.encode(TEXTS), changed.encode(TEXTS))
    assert again.merge() < 1e-5


def test_what_makes_no_sense_is_refused(llama, tmp_path):
    for ends in ((0, 1), (2, 1), (1, 3), (1, -1), (1, 9), (-9, 2)):
        with pytest.raises(InputError, match=r"take layers from 1 to 2 of this model|does not exist"):
            Encoder.load(llama, token_prepending=ends)
    for ends in ((1,), 2, (1, "half"), ("0%", 2)):
        with pytest.raises(InputError, match="token_prepending must be two layers, the first and the last"):
            Encoder.load(llama, token_prepending=ends)
    with pytest.raises(InputError, match="token_prepending must be left out where attention is bidirectional"):
        Encoder.load(llama, token_prepending=(1, 2), attention="bidirectional")
    n_prompt = sum(map(len, Encoder.load(llama, prompt="cluster").prompt_tokenizer.around("document")))
    Encoder.load(llama, prompt="cluster", max_tokens=256 - n_prompt)
    with pytest.raises(
        InputError, match=f"{n_prompt + 1} tokens of prompt do not fit the model's 256 positions: take at most {255 - n_prompt}"
    ):
        Encoder.load(llama, prompt="cluster", max_tokens=256 - n_prompt, token_prepending=(1, 2))
    with pytest.raises(InputError, match="token_prepending is a way to read a model as it is and cannot be trained with"):
        Encoder.load(llama, token_prepending=(1, 2)).add_adapter(2)


def test_shares_are_those_of_the_depth():
    assert replaced_layers((1, "20%"), 32) == range(1, 7)  # the paper's layers of Llama 2 7B
    assert replaced_layers((1, "20%"), 5) == range(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_compiled_layers_take_the_states_as_well(llama, first):
    """Whichever was compiled for: hooks come and go between calls."""
    plain = Encoder.load(llama, prompt="cluster", pooling="last")
    encoders = [plain, plain.with_contract(token_prepending=(1, 2))]
    expected = [encoder.encode(TEXTS) for encoder in encoders]
    for block in plain.blocks:
        block.compile(dynamic=True, backend="eager")  # the same graphs without a compiler behind them
    for i in (first, 1 - first, first):
        np.testing.assert_allclose(encoders[i].encode(TEXTS), expected[i], atol=1e-5)
