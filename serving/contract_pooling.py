"""Pooling over the tokens that an embedding contract names, as a module of sentence-transformers.

Needed where the contract leaves tokens out (the beginning-of-sequence token, or the prompt), which the pooling of
sentence-transformers does not. Legend: B sequences, L tokens of the longest, D numbers of a state.
"""

from typing import ClassVar

import torch
from sentence_transformers.base.modules.module import Module


class ContractPooling(Module):
    """States and mask of a batch -> `sentence_embedding` (B, D).

    pooling      "mean", "position-mean" (weight i for the i-th token counted, as SGPT) or "last"
    scope        "text": the tokens between the n_before of the prompt and the n_after behind the text; "all": all tokens
    skip_bos     leave the first token out, unless there is no other
    """

    config_keys: ClassVar = ["embedding_dimension", "pooling", "scope", "skip_bos", "n_before", "n_after"]

    def __init__(self, embedding_dimension: int, pooling: str, scope: str, skip_bos: bool, n_before: int, n_after: int):
        super().__init__()
        self.embedding_dimension, self.pooling, self.scope, self.skip_bos = embedding_dimension, pooling, scope, skip_bos
        self.n_before, self.n_after = n_before, n_after

    def forward(self, features: dict) -> dict:
        states = features["token_embeddings"]  # (B, L, D)
        mask = features["attention_mask"].long()  # (B, L), padded on either side
        place, length = mask.cumsum(1) - 1, mask.sum(1, keepdim=True)  # of each token in its sequence; (B, 1)
        first, end = torch.full_like(length, int(self.skip_bos)), length
        if self.scope == "text":
            start, stop = torch.full_like(length, self.n_before), length - self.n_after
            first, end = torch.where(start < stop, start, first), torch.where(start < stop, stop, end)
        first = torch.where(first < end, first, torch.zeros_like(first))
        chosen = (place >= first) & (place < end) & mask.bool()
        if self.pooling == "last":
            weights = chosen & (place == end - 1)
        elif self.pooling == "mean":
            weights = chosen
        else:
            weights = chosen * (place - first + 1)
        weights = weights.to(torch.float32)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        features["sentence_embedding"] = torch.einsum("bl,bld->bd", weights, states.float())
        return features

    def get_embedding_dimension(self) -> int:
        return self.embedding_dimension

    def save(self, output_path: str, *args, safe_serialization: bool = True, **kwargs) -> None:
        self.save_config(output_path)
