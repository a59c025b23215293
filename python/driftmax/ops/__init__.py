"""The fused primitives, one module each; importing them registers the ops with torch."""

from driftmax.ops import categorical, fill, gumbel_topk, lm_head_categorical, transfer, unmask

__all__ = ["categorical", "fill", "gumbel_topk", "lm_head_categorical", "transfer", "unmask"]
