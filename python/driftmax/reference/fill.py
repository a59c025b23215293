"""Noise from random words, operation for operation as docs/numerics.md section 2 writes it, and fills of it.

Every product and sum is its own torch operation, so nothing is contracted and every backend can match the
bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from driftmax.reference.philox import MASK, Streams, words, words64
from driftmax.reference.philox import streams as make_streams

PURPOSE = {"bits": 1, "uniform": 2, "exponential": 3, "gumbel": 4, "normal": 5}


def _constants(*texts: str) -> tuple[float, ...]:
    return tuple(float.fromhex(text) for text in texts)


_LOG = {
    torch.float32: _constants("0x1.55557ap-1", "0x1.995eacp-2", "0x1.31e4a4p-2"),
    torch.float64: _constants(
        "0x1.5555555555593p-1", "0x1.999999997fc9cp-2", "0x1.2492494202889p-2", "0x1.c71c51f9fb432p-3",
        "0x1.7466424c7c745p-3", "0x1.39a15d908163fp-3", "0x1.2f0943ff040d9p-3",
    ),
}  # fmt: skip
_LN2 = {
    torch.float32: _constants("0x1.62e3p-1", "0x1.2fefa2p-17"),
    torch.float64: _constants("0x1.62e42feep-1", "0x1.a39ef35793c76p-33"),
}
_SIN = {
    torch.float32: _constants("0x1.921fb6p+2", "-0x1.4abbb8p+5", "0x1.465e92p+6", "-0x1.2d92ep+6"),
    torch.float64: _constants(
        "0x1.921fb54442d18p+2", "-0x1.4abbce625be53p+5", "0x1.466bc6775aad9p+6", "-0x1.32d2cce62abbbp+6",
        "0x1.50783485c29cbp+5", "-0x1.e3074b4268892p+3", "0x1.e8eec754eeb76p+1", "-0x1.6c58b65f3a064p-1",
    ),
}  # fmt: skip
_COS = {
    torch.float32: _constants("-0x1.3bd3ccp+4", "0x1.03c1dep+6", "-0x1.55c664p+6", "0x1.d9f79ep+5"),
    torch.float64: _constants(
        "-0x1.3bd3cc9be45dep+4", "0x1.03c1f081b5ac4p+6", "-0x1.55d3c7e3cbfefp+6", "0x1.e1f5068919cd3p+5",
        "-0x1.a6d1f29f3f4c2p+4", "0x1.f9d3856db9818p+2", "-0x1.b6dd8290056ccp+0", "0x1.1e2f8121ee82cp-2",
    ),
}  # fmt: skip

# ONE, SQRT_HALF, mantissa bits, bias, and the integer type of the same width.
_BITS = {
    torch.float32: (0x3F800000, 0x3F3504F3, 23, 127, torch.int32),
    torch.float64: (0x3FF0000000000000, 0x3FE6A09E667F3BCD, 52, 1023, torch.int64),
}


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = coefficient + x * value
    return value


def uniform(hi: Tensor, lo: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Midpoints of 2**23 (float32) or 2**52 equal cells of (0, 1)."""
    if dtype == torch.float32 or lo is None:
        return ((hi >> 9).to(dtype) + 0.5) * 2.0**-23
    return (((hi << 20) | (lo >> 12)).to(dtype) + 0.5) * 2.0**-52


def unit(hi: Tensor, lo: Tensor, dtype: torch.dtype) -> Tensor:
    """A uniform on (0, 1) with full relative precision near 0."""
    return hi.to(dtype) * 2.0**-32 + (lo.to(dtype) * 2.0**-64 + 2.0**-65)


def log_core(f: Tensor, k: Tensor | int) -> Tensor:
    """log(1 + f) + k log 2 for 1 + f in [sqrt(1/2), sqrt(2)]."""
    high, low = _LN2[f.dtype]
    k = torch.as_tensor(k, device=f.device).to(f.dtype)
    s = f / (2 + f)
    z = s * s
    r = z * _horner(z, _LOG[f.dtype])
    h = (0.5 * f) * f
    return k * high - ((h - (s * (h + r) + k * low)) - f)


def log_pos(x: Tensor) -> Tensor:
    """Logarithm of a positive normal number."""
    one, sqrt_half, mantissa, bias, integer = _BITS[x.dtype]
    t = x.view(integer) + (one - sqrt_half)
    k = (t >> mantissa) - bias
    m = ((t & ((1 << mantissa) - 1)) + sqrt_half).view(x.dtype)
    return log_core(m - 1, k)


def exponential(hi: Tensor, lo: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """-log(1 - U), by log1p for small U and by the logarithm of the complement's bits otherwise."""
    small = hi < 0x4AFB0CCC
    u = torch.where(small, unit(hi, lo, dtype), 0.25)
    complement = unit(~hi & MASK, ~lo & MASK, dtype)
    return torch.where(small, -log_core(-u, 0), -log_pos(complement))


def gumbel(hi: Tensor, lo: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """-log E of an exponential E."""
    return -log_pos(exponential(hi, lo, dtype))


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded; torch's square root on the CPU is a library's and sometimes one bit off."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else torch.sqrt(x)


def normal(hi: Tensor, lo: Tensor, dtype: torch.dtype) -> Tensor:
    """Box–Muller on pairs: radius from the even element's draw, angle from the odd one's; [..., 2n]."""
    radius = _sqrt(2 * exponential(hi[..., 0::2], lo[..., 0::2], dtype))
    angle, fine = hi[..., 1::2], lo[..., 1::2]
    quadrant = ((angle + 0x20000000) & MASK) >> 30
    d = (angle - (quadrant << 30)) & MASK
    d = torch.where(d >= 2**31, d - 2**32, d)
    offset = 2.0**-33 if dtype == torch.float32 else fine.to(dtype) * 2.0**-64 + 2.0**-65
    x = d.to(dtype) * 2.0**-32 + offset
    z = x * x
    s, c = x * _horner(z, _SIN[dtype]), 1 + z * _horner(z, _COS[dtype])
    cosine = torch.where(quadrant == 0, c, torch.where(quadrant == 1, -s, torch.where(quadrant == 2, -c, s)))
    sine = torch.where(quadrant == 0, s, torch.where(quadrant == 1, c, torch.where(quadrant == 2, -s, -c)))
    return torch.stack((radius * cosine, radius * sine), dim=-1).flatten(-2)


def noise(streams: Streams, kind: int, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Elements start .. start + count (both even) of each stream: [draws, count]."""
    if kind == PURPOSE["bits"]:
        word = words(streams, kind, start, count)
        return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)
    hi, lo = words64(streams, kind, start, count)
    if kind == PURPOSE["uniform"]:
        return uniform(hi, lo, dtype)
    makers = {PURPOSE["exponential"]: exponential, PURPOSE["gumbel"]: gumbel, PURPOSE["normal"]: normal}
    return makers[kind](hi, lo, dtype)


@torch.no_grad()
def fill(
    out: Tensor,
    kind: int,
    n_rows: int,
    seed: int,
    seeds: Tensor | None,
    rows: Tensor | None,
    positions: Tensor | None,
    step: int,
    steps: Tensor | None,
) -> None:
    """Fill the contiguous `out`, seen as [n_rows, length], one stream per row. See ``driftmax.random``."""
    if positions is None:
        positions = torch.zeros(n_rows, dtype=torch.int64, device=out.device)
    streams = make_streams(n_rows, 1, seed, seeds, rows, positions, step, steps, out.device)
    table = out.view(n_rows, -1)
    chunk = max(4, (1 << 20) // n_rows // 4 * 4)  # elements of a row at a time: bounds the memory
    for start in range(0, table.shape[1], chunk):
        count = min(chunk, table.shape[1] - start)
        # Normals come in pairs: make the odd one's partner too and drop it.
        table[:, start : start + count] = noise(streams, kind, start, count + count % 2, out.dtype)[:, :count]
