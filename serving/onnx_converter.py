"""A folder of sentence-transformers as one ONNX model, pooling and normalization included: python onnx_converter.py FOLDER OUT.onnx CODE

CODE    1: the folder holds a module of its own, and is trusted to run it
The model takes `input_ids` and `attention_mask`, int64 (B, L) padded on the right, and gives `sentence_embedding`, float32 (B, D).
Its weights are in the dtype of the folder's; those of more than two gigabytes lie beside it in OUT.onnx.data.
"""

import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

ONE_FILE_BYTES = 1 << 30  # an ONNX file must be below two gigabytes, and the graph needs some of them


class IdsToVectors(nn.Module):
    """The modules of sentence-transformers, one after another."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.steps = nn.ModuleList(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        for step in self.steps:
            features = step(features)
        return features["sentence_embedding"].float()


def main(folder: str, out: str, code: str) -> None:
    model = SentenceTransformer(folder, device="cpu", trust_remote_code=code == "1", local_files_only=True)
    batch = model.tokenizer(["a text", "another one that is longer"], padding=True, return_tensors="pt")
    shape = {0: "batch", 1: "length"}
    program = torch.onnx.export(
        IdsToVectors(model).eval(),
        (batch["input_ids"], batch["attention_mask"]),
        dynamo=True,
        dynamic_shapes=(shape, shape),
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        verbose=False,
    )
    n_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    program.save(Path(out), external_data=n_bytes > ONE_FILE_BYTES)


if __name__ == "__main__":
    main(*sys.argv[1:])
