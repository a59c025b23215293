"""The fused primitives, one module each: public signature, argument checks, registration (done by this import)."""

from driftmax.ops import categorical, fill, gumbel_topk, lm_head_categorical

__all__ = ["categorical", "fill", "gumbel_topk", "lm_head_categorical"]
