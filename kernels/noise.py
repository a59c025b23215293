"""Words to noise, operation for operation as docs/numerics.md section 2 writes it. `F64` picks the
precision.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import core  # Triton 3.2 has add, sub and mul only there


def _constant(text: str) -> tl.constexpr:
    return tl.constexpr(float.fromhex(text))


SMALL = tl.constexpr(0x4AFB0CCC)  # U' below 1 - sqrt(1/2)

L0_32 = _constant("0x1.55557ap-1")
L1_32 = _constant("0x1.995eacp-2")
L2_32 = _constant("0x1.31e4a4p-2")
L0_64 = _constant("0x1.5555555555593p-1")
L1_64 = _constant("0x1.999999997fc9cp-2")
L2_64 = _constant("0x1.2492494202889p-2")
L3_64 = _constant("0x1.c71c51f9fb432p-3")
L4_64 = _constant("0x1.7466424c7c745p-3")
L5_64 = _constant("0x1.39a15d908163fp-3")
L6_64 = _constant("0x1.2f0943ff040d9p-3")
LN2_HI_32 = _constant("0x1.62e3p-1")
LN2_LO_32 = _constant("0x1.2fefa2p-17")
LN2_HI_64 = _constant("0x1.62e42feep-1")
LN2_LO_64 = _constant("0x1.a39ef35793c76p-33")

S0_32 = _constant("0x1.921fb6p+2")
S1_32 = _constant("-0x1.4abbb8p+5")
S2_32 = _constant("0x1.465e92p+6")
S3_32 = _constant("-0x1.2d92ep+6")
C0_32 = _constant("-0x1.3bd3ccp+4")
C1_32 = _constant("0x1.03c1dep+6")
C2_32 = _constant("-0x1.55c664p+6")
C3_32 = _constant("0x1.d9f79ep+5")
S0_64 = _constant("0x1.921fb54442d18p+2")
S1_64 = _constant("-0x1.4abbce625be53p+5")
S2_64 = _constant("0x1.466bc6775aad9p+6")
S3_64 = _constant("-0x1.32d2cce62abbbp+6")
S4_64 = _constant("0x1.50783485c29cbp+5")
S5_64 = _constant("-0x1.e3074b4268892p+3")
S6_64 = _constant("0x1.e8eec754eeb76p+1")
S7_64 = _constant("-0x1.6c58b65f3a064p-1")
C0_64 = _constant("-0x1.3bd3cc9be45dep+4")
C1_64 = _constant("0x1.03c1f081b5ac4p+6")
C2_64 = _constant("-0x1.55d3c7e3cbfefp+6")
C3_64 = _constant("0x1.e1f5068919cd3p+5")
C4_64 = _constant("-0x1.a6d1f29f3f4c2p+4")
C5_64 = _constant("0x1.f9d3856db9818p+2")
C6_64 = _constant("-0x1.b6dd8290056ccp+0")
C7_64 = _constant("0x1.1e2f8121ee82cp-2")

TWO_M23 = _constant("0x1p-23")
TWO_M32 = _constant("0x1p-32")
TWO_M33 = _constant("0x1p-33")
TWO_M52 = _constant("0x1p-52")
TWO_M64 = _constant("0x1p-64")
TWO_M65 = _constant("0x1p-65")

# ONE - SQRT_HALF, SQRT_HALF and the mantissa mask as integers
SHIFT_32 = tl.constexpr(0x3F800000 - 0x3F3504F3)
SQRT_HALF_32 = tl.constexpr(0x3F3504F3)
MANTISSA_32 = tl.constexpr(0x7FFFFF)
SHIFT_64 = tl.constexpr(0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
SQRT_HALF_64 = tl.constexpr(0x3FE6A09E667F3BCD)
MANTISSA_64 = tl.constexpr(0xFFFFFFFFFFFFF)


@triton.jit
def uniform(hi, lo, F64: tl.constexpr):
    """Midpoints of 2**23 or 2**52 equal cells of (0, 1); float32 ignores `lo`."""
    if F64:
        # hi << 20 | lo >> 12, put together in float64: both parts and the sum are exact
        m = hi.to(tl.float64) * 1048576.0 + (lo >> 12).to(tl.float64)
        u = (m + 0.5) * TWO_M52
    else:
        u = ((hi >> 9).to(tl.float32) + 0.5) * TWO_M23
    return u


@triton.jit
def unit(hi, lo, F64: tl.constexpr):
    """A uniform on (0, 1) with full relative precision near 0."""
    if F64:
        u = hi.to(tl.float64) * TWO_M32 + (lo.to(tl.float64) * TWO_M64 + TWO_M65)
    else:
        u = hi.to(tl.float32) * TWO_M32 + (lo.to(tl.float32) * TWO_M64 + TWO_M65)
    return u


@triton.jit
def log_core(f, k, F64: tl.constexpr):
    """log(1 + f) + k log 2 for 1 + f in [sqrt(1/2), sqrt(2)]; `k` already converted."""
    if F64:
        s = f / (f + 2.0)
        z = s * s
        r = z * L6_64 + L5_64
        r = z * r + L4_64
        r = z * r + L3_64
        r = z * r + L2_64
        r = z * r + L1_64
        r = z * (z * r + L0_64)
        h = (f * 0.5) * f
        log = k * LN2_HI_64 - ((h - (s * (h + r) + k * LN2_LO_64)) - f)
    else:
        s = tl.div_rn(f, f + 2.0)
        z = s * s
        r = z * L2_32 + L1_32
        r = z * (z * r + L0_32)
        h = (f * 0.5) * f
        log = k * LN2_HI_32 - ((h - (s * (h + r) + k * LN2_LO_32)) - f)
    return log


@triton.jit
def log_parts(x, F64: tl.constexpr):
    """f and k (both floating) with x = (1 + f) 2**k, for `log_core`; x positive and normal."""
    if F64:
        t = x.to(tl.int64, bitcast=True) + SHIFT_64
        k = ((t >> 52) - 1023).to(tl.int32).to(tl.float64)
        f = ((t & MANTISSA_64) + SQRT_HALF_64).to(tl.float64, bitcast=True) - 1.0
    else:
        t = x.to(tl.int32, bitcast=True) + SHIFT_32
        k = ((t >> 23) - 127).to(tl.float32)
        f = ((t & MANTISSA_32) + SQRT_HALF_32).to(tl.float32, bitcast=True) - 1.0
    return f, k


@triton.jit
def log_pos(x, F64: tl.constexpr):
    """Logarithm of a positive normal number."""
    f, k = log_parts(x, F64)
    return log_core(f, k, F64)


@triton.jit
def exponential(hi, lo, F64: tl.constexpr):
    """-log(1 - U). The two branches share one `log_core`: k = 0 gives the log1p branch bit for bit."""
    small = hi < SMALL
    f, k = log_parts(unit(hi ^ 0xFFFFFFFF, lo ^ 0xFFFFFFFF, F64), F64)
    f = tl.where(small, unit(hi, lo, F64) * -1.0, f)
    k = tl.where(small, k * 0.0, k)
    return log_core(f, k, F64) * -1.0


@triton.jit
def gumbel(hi, lo, F64: tl.constexpr):
    """-log E of an exponential E."""
    return log_pos(exponential(hi, lo, F64), F64) * -1.0


@triton.jit
def normal_pair(hi, lo, angle, fine, F64: tl.constexpr):
    """Box–Muller: elements 2j and 2j + 1 from the draws (hi, lo) of the first and (angle, fine) of the
    second.
    """
    quadrant = core.add(angle, 0x20000000, sanitize_overflow=False) >> 30
    d = core.sub(angle, quadrant << 30, sanitize_overflow=False).to(tl.int32, bitcast=True)
    if F64:
        radius = tl.sqrt(exponential(hi, lo, True) * 2.0)
        x = d.to(tl.float64) * TWO_M32 + (fine.to(tl.float64) * TWO_M64 + TWO_M65)
        z = x * x
        s = z * S7_64 + S6_64
        s = z * s + S5_64
        s = z * s + S4_64
        s = z * s + S3_64
        s = z * s + S2_64
        s = z * s + S1_64
        s = x * (z * s + S0_64)
        c = z * C7_64 + C6_64
        c = z * c + C5_64
        c = z * c + C4_64
        c = z * c + C3_64
        c = z * c + C2_64
        c = z * c + C1_64
        c = z * (z * c + C0_64) + 1.0
    else:
        radius = tl.sqrt_rn(exponential(hi, lo, False) * 2.0)
        x = d.to(tl.float32) * TWO_M32 + TWO_M33
        z = x * x
        s = z * S3_32 + S2_32
        s = z * s + S1_32
        s = x * (z * s + S0_32)
        c = z * C3_32 + C2_32
        c = z * c + C1_32
        c = z * (z * c + C0_32) + 1.0
    odd = (quadrant & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    # quadrants: 0 (C, S), 1 (-S, C), 2 (-C, -S), 3 (S, -C)
    cosine = tl.where((quadrant == 1) | (quadrant == 2), cosine * -1.0, cosine)
    sine = tl.where(quadrant >= 2, sine * -1.0, sine)
    return radius * cosine, radius * sine
