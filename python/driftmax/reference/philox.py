"""Philox4x32-10 (Salmon et al., SC 2011) and the counter layout of docs/numerics.md, in int64 tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
PLANE = 0x80  # purpose bit of the second word of a 64-bit draw


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the product of two 32-bit words, without leaving int64."""
    top, bottom = a * (b >> 16), a * (b & 0xFFFF)
    return (top + (bottom >> 16)) >> 16, (((top & 0xFFFF) << 16) + bottom) & MASK


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on four counter words under two key words: int64 tensors of 32-bit words, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


class Streams(NamedTuple):
    """One stream per draw: int64 tensors of shape [draws]."""

    seed: Tensor
    row: Tensor
    position: Tensor
    step: Tensor


def streams(
    n0: int,
    n1: int,
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
    device: torch.device,
) -> Streams:
    """Streams of n0 * n1 draws from an op's arguments; draw i belongs to row i // n1."""
    draw = torch.arange(n0 * n1, device=device)
    row = torch.div(draw, n1, rounding_mode="floor")
    if seeds is None:
        seeds = torch.tensor([seed], device=device)
    return Streams(
        seeds.expand(n0)[row],
        row if rows is None else rows[row],
        draw % n1 if positions is None else positions.reshape(-1),
        (torch.tensor([step], device=device) if steps is None else steps).expand(n0 * n1),
    )


def words(streams: Streams, purpose: int, start: Tensor | int, count: int) -> Tensor:
    """Words of elements start .. start + count of each stream, [draws, count]; `start` divides by four."""
    seed, row, position, step = (field.unsqueeze(1) for field in streams)
    first = torch.as_tensor(start, device=seed.device).reshape(-1, 1) // 4
    block = first + torch.arange((count + 3) // 4, device=seed.device)
    counter = (block & MASK, (position + (block >> 32)) & MASK, step | (purpose << 24), row)
    output = philox4x32(counter, (seed & MASK, (seed >> 32) & MASK))
    return torch.stack(output, dim=-1).flatten(1)[:, :count]


def words64(streams: Streams, purpose: int, start: Tensor | int, count: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit draws of the same elements."""
    return words(streams, purpose, start, count), words(streams, purpose | PLANE, start, count)
