"""Gradient times input: which tokens' embeddings move a text's vector away from that of an empty text, to first order.

A second opinion beside the attention, of another kind: it goes through values, norms and the layers between as well. What is
differentiated has to be one number, and the answer is about that number alone. Here it is the cosine between the text's vector and the
vector of an empty text under the same prompt (without a prompt, of BOS alone). It is 1 where the text changes nothing. Each token's value
is the scalar product of its embedding with the gradient of that cosine: negative for a token that moves the vector away from the prompt's,
positive for one that holds it there. (The squared norm of a vector would not do: after the final norm it hardly depends on the text.)

Legend: B sequences of a batch, T tokens of its row, D hidden size, n tokens of a sequence.
"""

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_analysis.received import of_each_text
from encoder.packing import PackedBatch
from files.console import InputError

if TYPE_CHECKING:
    from encoder.encoder import Encoder

SCALAR = "cosine of the text's vector and that of an empty text under the same prompt"


def gradient_times_input(encoder: "Encoder", texts: list[str], role: str = "document") -> list[np.ndarray]:
    """Gradient of `SCALAR` times the embedding of each token: float32 (n,) for each text, signed. A text without a token has (0,).

    Raises InputError where an empty text has no token at all (neither BOS nor a prompt), and as `check_looked_at` does.
    """
    alone = copy.copy(encoder)
    alone.share_prefix = False  # the tokens of a prefix that texts share have no gradient of each text's own
    reference = torch.from_numpy(encoder.encode([""], role)).to(encoder.device)
    if not reference.any():
        raise InputError("gradient x input compares with an empty text, which has no token here: take a prompt")

    def compute(batch: PackedBatch) -> list[np.ndarray]:
        embeddings: list[Tensor] = []

        def keep(_, __, output: Tensor) -> Tensor:
            embeddings.append(output.detach().requires_grad_())
            return embeddings[0]

        hook = encoder.decoder.get_input_embeddings().register_forward_hook(keep)
        try:
            (vectors,) = alone.embed(batch)
        finally:
            hook.remove()
        scalar = F.cosine_similarity(vectors.float(), reference).sum()  # of texts that do not see each other
        (gradient,) = torch.autograd.grad(scalar, embeddings)  # leaves no gradient on the weights
        values = (gradient.float() * embeddings[0].detach().float()).sum(-1)[0, : len(batch.ids)]  # (T,): one sequence behind the other
        return [of_text.cpu().numpy() for of_text in values.split(batch.lengths.tolist())]

    return of_each_text(alone, texts, role, compute, np.zeros(0, np.float32), grad=True)
