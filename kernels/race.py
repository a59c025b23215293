"""The token race of docs/numerics.md section 3 on a tile, and what kernels do with one draw's scalars and
logits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from driftmax.kernels import noise
from driftmax.kernels.philox import element_words, single_words

FAR = tl.constexpr(1 << 62)  # above every index

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def float64_of(lo, hi):
    """The float64 whose halves these int32 scalars are; Triton passes Python floats as float32."""
    bits = (hi.to(tl.int64) << 32) | (lo.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def per_draw(draw, lo, hi, values):
    """A float64 parameter of one draw: from the tensor if there is one, else the scalar given in halves."""
    value = float64_of(lo, hi)
    if values is not None:
        value = tl.load(values + draw)
    return value


@triton.jit
def scale_of(temperature):
    """(temperature or 1 where it is 0, whether it is 0)."""
    greedy = temperature == 0.0
    # A sum, as Triton 3.2 breaks a choice by the condition of a later branch.
    return temperature + greedy.to(tl.float64), greedy


@triton.jit
def row_of(logits, draw, n1, s0, s1):
    """Pointer to the logits of a draw; offsets in 64 bits."""
    leading = draw // n1
    return logits + leading * s0 + (draw - leading * n1) * s1


@triton.jit
def widened(values):
    """Logits in the precision that holds them all: float64 for float64, else float32."""
    wide = values
    if values.dtype != tl.float64:
        wide = values.to(tl.float32)
    return wide


@triton.jit
def tile_index(first, Q: tl.constexpr):
    """Token numbers of the tile that starts at `first`, int64 [Q, 4]: a row of it shares a Philox call."""
    return first + (tl.arange(0, Q).to(tl.int64) * 4)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def load_tile(row, first, vocab, Q: tl.constexpr):
    """The tile of logits that starts at token `first`, -inf behind the end."""
    index = tile_index(first, Q)
    return widened(tl.load(row + index, mask=index < vocab, other=float("-inf")))


@triton.jit
def reaches(values, best, scale, greedy, hi):
    """Which tokens of a tile may beat `best` (float64), judged by the high word alone, in float32, erring
    towards yes.

    A token wins only if its exponential E is below exp(y - best), and E >= U >= hi * 2**-32. What cannot be
    judged in float32 (NaN, overflow, extreme temperatures) is not rejected. A greedy row has no noise: only
    larger logits pass.
    """
    ordinary = (scale > 1e-30) & (scale < 1e30)
    y = values.to(tl.float32) * tl.where(ordinary, 1.0 / scale, float("nan")).to(tl.float32)
    top = best.to(tl.float32)
    # 2**-20 covers several float32 roundings
    slack = (tl.abs(y) + tl.abs(top)) * 9.5367431640625e-07 + 9.5367431640625e-07
    limit = tl.exp2(((y - top) + slack) * 1.442695) * 1.001
    loses = hi.to(tl.float32) * 2.3283064365386963e-10 > limit
    below = values.to(tl.float64) <= best * scale
    return (values != float("-inf")) & (tl.where(greedy, below, loses) == 0)


@triton.jit
def exact_scores(values, scale, greedy, hi, lo):
    """y + G in float64, or y for a greedy row; NaN where the logit is."""
    y = values.to(tl.float64) / scale
    return tl.where(greedy, y, y + noise.gumbel(hi, lo, True))


@triton.jit
def largest(values):
    """Maximum of a tile, NaN ignored."""
    return tl.max(tl.max(values, axis=1), axis=0)


@triton.jit
def total(values):
    """Sum of a tile."""
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def first_where(condition, index):
    """Lowest index where `condition` holds on a tile, FAR where it never does."""
    return tl.min(tl.min(tl.where(condition, index, FAR), axis=1), axis=0)


@triton.jit
def winner_of(scores, index, best, best_index):
    """Fold a tile's scores into the best so far: the largest, lowest index on ties, NaN never; tiles in any
    order.
    """
    scores = tl.where(scores == scores, scores, float("-inf"))
    top = largest(scores)
    at = first_where(scores == top, index)
    better = (top > best) | ((top == best) & (at < best_index))
    return tl.where(better, top, best), tl.where(better, at, best_index)


@triton.jit
def near_gumbel(hi):
    """(float32 Gumbel, whether it is within 2**-11 of the exact one) by the high word alone.

    U and 1 - U come from the word and its complement: both are good to 2**-13 unless the word is among the
    first or last 4096. Below 2**-7 -log(1 - U) is a series: there a fast logarithm would have lost it.
    """
    u = (hi.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((hi ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1.0 + u * (0.5 + u * 0.33333334))
    e = tl.where(u < 0.0078125, series, tl.log2(rest) * -0.6931472)
    middle = (hi >= 4096) & (hi <= 0xFFFFEFFF)
    return tl.log2(e) * -0.6931472, middle


@triton.jit
def contenders(values, top, best, scale, hi):
    """Which tokens of a tile may beat `best` (float64) and all others of the tile, erring towards yes.

    Judged by y - y_top + G in float32 with G from the high word, within 2**-11. What can win lies less than
    50 nats below the maximum `top`, where y - y_top is good to 2**-16; |y_top| * 2**-48 is for scores that
    were rounded at y's own magnitude. What cannot be judged (NaN, +inf, a Gumbel that needs its low word, an
    extreme temperature) may win.
    """
    inverse = 1.0 / scale
    height = top.to(tl.float64) * inverse
    if values.dtype == tl.float64:
        gap = ((values - top) * inverse).to(tl.float32)
    else:
        ordinary = (scale > 1e-30) & (scale < 1e30)
        gap = (values - top) * tl.where(ordinary, inverse, float("nan")).to(tl.float32)
    gumbel, sure = near_gumbel(hi)
    score = gap + gumbel
    most = largest(tl.where(sure, score, float("-inf")))
    bar = tl.maximum(most, (best - height).to(tl.float32))
    bar -= 0.001953125 + (tl.abs(height) * 3.552713678800501e-15).to(tl.float32)
    loses = sure & (score < bar)
    return (values != float("-inf")) & (loses == 0)


@triton.jit
def race_tile(
    values,
    first,
    best,
    best_index,
    scale,
    greedy,
    purpose: tl.constexpr,
    Q: tl.constexpr,
    k0,
    k1,
    position,
    step,
    row_id,
):
    """Token race on one tile against the best so far. Returns the new best and a status code, 0, 1 (NaN) or
    2 (+inf).

    Tiles come in ascending order, so that a tie stays with the lower index. Almost no tile reaches the best;
    in one that does, scores are exact for the few contenders only, one after the other.
    """
    index = tile_index(first, Q)
    code = 0
    if greedy:
        code = status_of(values)
        top = largest(values)
        score = top.to(tl.float64)  # the scale is 1
        highest = first_where(values == top, index)
        best_index = tl.where(score > best, highest, best_index)
        best = tl.where(score > best, score, best)
    else:
        hi = element_words(first // 4, Q, purpose, 0, k0, k1, position, step, row_id)
        if largest(reaches(values, best, scale, greedy, hi).to(tl.int32)) > 0:
            code = status_of(values)
            open_ = contenders(values, largest(values), best, scale, hi)
            at = first_where(open_, index)
            while (at < FAR) & (code == 0):
                value = largest(tl.where(index == at, values, float("-inf")))
                high = single_words(at, purpose, 0, k0, k1, position, step, row_id)
                low = single_words(at, purpose, 1, k0, k1, position, step, row_id)
                score = exact_scores(value, scale, greedy, high, low)
                if score > best:
                    best = score
                    best_index = at
                open_ = open_ & (index > at)
                at = first_where(open_, index)
    return best, best_index, code


@triton.jit
def status_of(values):
    """1 if a logit of the tile is NaN, else 2 if one is +inf, else 0."""
    bad = tl.where(values != values, 2, (values == float("inf")).to(tl.int32))
    worst = largest(bad)
    return tl.where(worst > 0, 3 - worst, 0)


@triton.jit
def report(status, draw, code):
    """Leave `code` for `draw` in the status word unless an earlier report is there."""
    if code > 0:
        tl.atomic_cas(status, tl.zeros((), tl.int64), code.to(tl.int64) | (draw << 8))


@triton.jit
def powers(values, top, scale, COARSE: tl.constexpr = False):
    """(log2 of exp(y - y_top), its power of two) of logits `values` under their maximum `top`, in `values`'
    precision.

    float32: the quotient log2(e)/T has two parts, so that the argument's error is that of two roundings.
    COARSE: logits of 16 bits, whose differences are mostly exact, so that one part does as well. The floor
    keeps -inf and overflow out of inf - inf, and lets NaN through; 2**-1100 is 0 in both precisions.
    """
    if values.dtype == tl.float64:
        exponent = (values - top) / scale * LOG2E
        exponent = tl.maximum(exponent, -1100.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        # Temperatures beyond 2**60 shrink the logits first, or the floor would not be finite. Below 2**-126
        # they act as that: logits that differ by 2**-115 then differ without end.
        factor = LOG2E / scale
        shrink = tl.where(factor < 2.0**-60, 2.0**-60, 1.0)
        factor = tl.minimum(tl.maximum(factor / shrink, 2.0**-100), 2.0**126)
        high = factor.to(tl.float32)
        floor = (-1100.0 / factor).to(tl.float32)
        shrink = shrink.to(tl.float32)
        gap = tl.fma(values, shrink, top * -shrink)
        gap = tl.maximum(gap, floor, propagate_nan=tl.PropagateNan.ALL)
        if COARSE:
            exponent = gap * high
        else:
            exponent = tl.fma(gap, high, gap * (factor - high.to(tl.float64)).to(tl.float32))
    return exponent, tl.exp2(exponent)


@triton.jit
def store_stats(stats, draws, draw, chosen, top, second, scale, mass, moment):
    """log_prob, log_z, entropy, margin from the row's maximum, runner-up, sum of e**(y - y_top) and of (y -
    y_top) e**...

    All float64 scalars; `chosen` is the drawn token's logit.
    """
    log_mass = tl.log(mass)
    kind: tl.constexpr = stats.dtype.element_ty
    tl.store(stats + draw, ((chosen - top) / scale - log_mass).to(kind))
    tl.store(stats + draws + draw, (top / scale + log_mass).to(kind))
    tl.store(stats + 2 * draws + draw, tl.maximum(log_mass - moment / mass, 0.0).to(kind))
    tl.store(stats + 3 * draws + draw, ((1.0 - tl.exp((second - top) / scale)) / mass).to(kind))
