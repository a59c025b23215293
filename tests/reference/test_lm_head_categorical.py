"""The reference `lm_head_categorical` is the reference `categorical` of the product."""

from __future__ import annotations

import driftmax
import pytest
import torch


@pytest.mark.parametrize(
    "options", [{}, {"method": "gumbel"}, {"top_k": 7, "top_p": 0.9, "temperature": 0.5}]
)
def test_equals_categorical_of_the_product(options):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).double() for shape in ((6, 3, 16), (3000, 16), (3000,))
    )
    arguments = {"rng": 4, "return_stats": True, "backend": "reference", **options}
    ours, our_stats = driftmax.lm_head_categorical(hidden, weight, bias, **arguments)
    wanted, stats = driftmax.categorical(hidden @ weight.T + bias, **arguments)
    assert torch.equal(ours, wanted)
    for left, right in zip(our_stats, stats, strict=True):
        torch.testing.assert_close(left, right)
