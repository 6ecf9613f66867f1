"""Small random models of the classes that most tests run, made on the spot: real configs and tokenizers, no download."""

import itertools
import os
import shutil
import sys
import tempfile

# Tests run on the CPU, whatever the machine has, unless those marked gpu were asked for: in bfloat16 on a GPU no tolerance would hold.
if not any(flag == "-m" and "gpu" in value and "not gpu" not in value for flag, value in itertools.pairwise(sys.argv)):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# models this small gain nothing from threads, and lose much where other work has the cores; scripts that tests start as well
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():  # set before anything imports the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
# pairs are mapped from a cache of files: tests leave the user's alone
os.environ["HF_DATASETS_CACHE"] = (CACHE := tempfile.TemporaryDirectory()).name

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

TEXTS = [
    "The cat sat on the mat.",
    "a",
    "Interest rates rose again this month, and the bank raised its fees for every account that is overdrawn.",
    "To be, or not to be: that is the question.",
    "",
]

SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256}
GQA = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
# the class behind each preset; sliding windows are shorter than the longest text
CONFIGS = {
    "llama": (LlamaConfig, GQA, True, "metaspace"),
    "mistral": (MistralConfig, GQA | {"sliding_window": 12}, True, "bytes"),
    "qwen3": (Qwen3Config, GQA, False, "bytes"),
    "gemma3": (
        Gemma3TextConfig,
        GQA | {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        True,
        "bytes",
    ),
    "gpt-neox": (GPTNeoXConfig, {"intermediate_size": 48}, False, "bytes"),
}
ARCHITECTURES = tuple(CONFIGS)


def make_tokenizer(kind: str, bos: bool, eos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = []
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, 'This sentence: "belongs to the following cluster:'] * 3, trainer)
    template = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_model(folder, architecture: str, seed: int = 0, eos: bool = False):
    config_class, extra, bos, kind = CONFIGS[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**SMALL, **extra, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():  # larger weights than at a usual start: differences between paths must show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    make_tokenizer(kind, bos, eos).save_pretrained(folder)
    return str(folder)


def randomize_adapter(encoder, std: float = 0.1) -> None:
    """A fresh adapter changes nothing: its second matrix is zero. This one does."""
    with torch.no_grad():
        for parameter in encoder.trainable().values():
            parameter.normal_(std=std)


def make_run(model: str, folder, seed: int = 0, **contract) -> str:
    """A run whose adapter is random but not zero."""
    from encoder import Encoder

    encoder = Encoder.load(model, **contract)
    torch.manual_seed(seed)
    encoder.add_adapter(4)
    randomize_adapter(encoder)
    encoder.save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, name) for name in CONFIGS}


@pytest.fixture(params=ARCHITECTURES)
def model(request, models_dir) -> str:
    return models_dir[request.param]


@pytest.fixture
def llama(models_dir) -> str:
    return models_dir["llama"]


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory, models_dir) -> str:
    """A model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "chat-model"
    shutil.copytree(models_dir["qwen3"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    return str(folder)
