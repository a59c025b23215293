"""One file per op or workload: it offers ``workloads(settings)``, ``report(settings)``, or both."""

from __future__ import annotations

import importlib
from types import ModuleType

#: Case names in the order in which a full run takes them, with what they measure.
CASES = {
    "categorical": "one draw per row of logits: methods, dtypes, batch sizes, filters, real logits",
    "gumbel_topk": "k draws per row without replacement",
    "lm_head_categorical": "hidden states and head weights to tokens, logits never stored",
    "unmask": "one step of masked diffusion on stored logits: which positions, and their tokens",
    "transfer": "dLLM decoding: writing the tokens with the best scores",
    "fill": "uniform, exponential, Gumbel and normal fills",
    "overhead": "what one call on a tiny tensor costs beside the work",
    "discrete": "masked diffusion: network calls, sampler time, RADD-small end to end",
    "decoding": "dLLM decoding rules whole, against their published and their best torch forms",
    "law": "the fault figure: what fp32 noise does to masked-diffusion sampling",
}


def load(name: str) -> ModuleType:
    """The module of a case.

    Raises
    ------
    KeyError
        For a name that is not in :data:`CASES`.
    """
    if name not in CASES:
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}")
