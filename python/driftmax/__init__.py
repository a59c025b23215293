"""driftmax draws samples: exact, fast, reproducible."""

from __future__ import annotations

from driftmax import random
from driftmax.errors import BackendUnavailable, InvalidDistribution, check_status
from driftmax.ops._dispatch import available_backends, set_debug, use_backend
from driftmax.ops.categorical import CategoricalStats, categorical
from driftmax.ops.gumbel_topk import gumbel_topk
from driftmax.ops.lm_head_categorical import lm_head_categorical
from driftmax.ops.transfer import transfer
from driftmax.ops.unmask import unmask
from driftmax.random import RowStreams

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "CategoricalStats",
    "InvalidDistribution",
    "RowStreams",
    "available_backends",
    "categorical",
    "check_status",
    "gumbel_topk",
    "lm_head_categorical",
    "random",
    "set_debug",
    "transfer",
    "unmask",
    "use_backend",
]
