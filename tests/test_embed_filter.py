"""`embed_filter`: the directions of the unembedding matrix that are dropped, and where the matrix comes from."""

import json

import numpy as np
import pytest
import torch
from conftest import TEXTS, make_run
from safetensors.torch import load_file, save_file

from encoder import Encoder
from encoder.embed_filter import projection, unembedding
from files.console import InputError


def test_a_quarter_of_the_directions_is_dropped_at_either_end():
    """Against the singular value decomposition of the paper's code, whose coordinates have the same cosines."""
    matrix = torch.randn(90, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 16)
    filtered = projection(matrix, 0.5)
    _, _, directions = torch.linalg.svd(matrix.double())
    middle = directions[4:12]
    torch.testing.assert_close(filtered.double(), middle.T @ middle, atol=1e-6, rtol=0)
    torch.testing.assert_close(filtered @ filtered, filtered, atol=1e-6, rtol=0)


def test_the_matrix_is_that_of_the_models_head(llama, tied_model, tmp_path):
    with_head = Encoder.load(llama)
    stored = load_file(with_head.folder / "model.safetensors")
    torch.testing.assert_close(unembedding(with_head.folder, with_head.decoder), stored["lm_head.weight"])
    tied = Encoder.load(tied_model)
    torch.testing.assert_close(unembedding(tied.folder, tied.decoder), tied.decoder.get_input_embeddings().weight)
    save_file({name: w for name, w in stored.items() if name != "lm_head.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"holds no unembedding matrix \(lm_head\.weight, .*leave it out"):
        unembedding(tmp_path, with_head.decoder)


@pytest.fixture
def tied_model(tmp_path, llama):
    """A model whose head is its embeddings."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(llama)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "tied")
    return str(tmp_path / "tied")


@pytest.mark.parametrize("pooling", ["mean", "last+mean"])
def test_vectors_are_filtered_before_they_are_cut_and_normalized(llama, tmp_path, pooling):
    plain = Encoder.load(llama, pooling=pooling, normalize=False).encode(TEXTS)
    encoder = Encoder.load(llama, pooling=pooling, embed_filter=0.5, dims=20)
    matrix = projection(unembedding(encoder.folder, encoder.decoder), 0.5).numpy()
    expected = np.concatenate([part @ matrix for part in np.split(plain, plain.shape[1] // 32, 1)], 1)[:, :20]
    np.testing.assert_allclose(encoder.encode(TEXTS), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    run = make_run(llama, tmp_path / "run", pooling=pooling, embed_filter=0.5, dims=20)
    assert json.loads((tmp_path / "run" / "embedding.json").read_text())["embed_filter"] == 0.5
    assert Encoder.load(run).untuned().fingerprint == encoder.fingerprint
    for share in (1.0, 0.0, "half"):
        with pytest.raises(InputError, match="embed_filter must be between 0 and 1"):
            Encoder.load(llama, embed_filter=share)


def test_training_filters_in_float32(llama):
    encoder = Encoder.load(llama, pooling="mean", embed_filter=0.5, normalize=False)
    batch = encoder.collate(encoder.tokenize(TEXTS), list(range(len(TEXTS))))
    states = encoder.forward(batch)
    expected = encoder.pool(states, batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder.pool(states, batch), expected)
