"""What shows only when a model runs: classes whose states cannot be read, and vectors that are not finite."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from encoder.base_models import RUNNING_ERRORS
from encoder.contract import PoolingConfig
from encoder.packing import collate
from encoder.runtime import is_out_of_memory
from encoder.tokenization import TokenizedTexts
from files.console import InputError

if TYPE_CHECKING:
    from encoder.encoder import Encoder


@torch.no_grad()
def check_padded(encoder: "Encoder") -> None:
    """Run a few tokens through a model that nothing here was written for. Raises InputError where its states cannot be read.

    The model must be causal, also where texts are padded, and every state must be as wide as the config says.
    """
    model = encoder.decoder
    name, width = f"{encoder.contract.base}, of type {model.config.model_type!r}", model.config.hidden_size
    tokens = TokenizedTexts([[1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 3, 5, 4]], [(0, 5), (0, 3), (0, 5)], 0, 0, 0)
    batch = collate(tokens, [0, 1, 2], 0, False, next(model.parameters()).device)
    try:
        states = encoder.forward(batch, [PoolingConfig("mean", layers=(0, 1, -1))]).layers.values()
    except RUNNING_ERRORS as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise InputError(f"{name}, cannot be run here: {' '.join(str(error).split())[:200]}") from None
    for state in states:
        if state.shape[1:] != (width,):
            raise InputError(f"{name}: its states have {tuple(state.shape[1:])} numbers instead of {width}, which is not supported")
        first, *others = (state[start : start + 3].float() for start in (0, 5, 8))
        tolerance = torch.finfo(encoder.dtype).eps ** 0.5 * first.norm()
        if any((first - other).norm() > tolerance for other in others):  # not where one is NaN: `encode` says what that may be
            raise InputError(f"{name}: its states change with the tokens behind them, or with padding: it is no causal decoder")


class NonFiniteError(InputError):
    """A vector holds an infinity or a NaN."""


def refuse_non_finite(vectors: np.ndarray, first_number: int, dtype: torch.dtype) -> None:
    """Raise NonFiniteError for the first vector of (N, D) that is not finite, as that of text `first_number` + its row."""
    number = first_number + int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
    hint = "float16 overflows with this model: take float32 or bfloat16" if dtype == torch.float16 else "are the weights damaged?"
    raise NonFiniteError(f"the vector of text {number} has numbers that are not finite, in {str(dtype).removeprefix('torch.')}: {hint}")
