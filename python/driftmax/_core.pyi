"""Types of the compiled extension.

Every pointer is the integer ``tensor.data_ptr()``; 0 means "absent, use the scalar beside it". Callers own
shapes, strides and lifetimes: ``driftmax.ops`` checks them, and nothing else calls this module.

Streams: ``seed`` (64-bit) or ``seeds`` (int64*, one per row), ``row_ids`` (int64*, one per leading row;
0 means 0, 1, ...), ``positions`` (int64*, one per draw; 0 means draw % n1), ``step``.
Logits: draw i = a * n1 + b reads ``vocab`` contiguous values at ``a * s0 + b * s1`` (element strides).
dtype codes: 0 float32, 1 float64, 2 float16, 3 bfloat16.
Status: 0, or code | row << 8 with code 1 NaN, 2 +inf, 3 no token of positive probability, 4 fewer than k.
"""

def philox4x32(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int, /) -> tuple[int, int, int, int]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def borrow_team(gomp_parallel: int, /) -> None:
    """Use the threads of the OpenMP runtime whose entry this is; 0: the core's own. Forked children have
    their own again.
    """

def team_is_borrowed() -> bool: ...
def read_sum(data: int, nbytes: int, threads: int, /) -> float:
    """Sum of a float32 buffer: one bare read of it, the limit the bench divides by."""

def fill(
    kind: int,  # 1 bits (dtype code 4: int32), 2 uniform, 3 exponential, 4 gumbel, 5 normal
    dtype: int,
    out: int,
    rows: int,
    row_length: int,
    row_stride: int,
    seed: int,
    seeds: int,
    row_ids: int,
    positions: int,
    step: int,
    threads: int,
    /,
) -> None:
    """positions here: one per row (0 means position 0)."""

def categorical(
    logits: int,
    dtype: int,
    n0: int,
    n1: int,
    s0: int,
    s1: int,
    vocab: int,
    seed: int,
    seeds: int,
    row_ids: int,
    positions: int,
    step: int,
    temperature: float,
    temperatures: int,  # float64*, one per draw
    top_k: int,  # 0: off
    top_ks: int,  # int64*
    top_p: float,  # 1.0: off
    top_ps: int,  # float64*
    min_p: float,  # 0.0: off
    min_ps: int,  # float64*
    method: int,  # 0 block, 1 gumbel
    tokens: int,  # int64* [n0 * n1]
    stats: int,  # [4, draws] log_prob, log_z, entropy, margin; float64 for float64 logits, else float32; or 0
    threads: int,
    /,
) -> int: ...
def gumbel_topk(
    logits: int,
    dtype: int,
    n0: int,
    n1: int,
    s0: int,
    s1: int,
    vocab: int,
    seed: int,
    seeds: int,
    row_ids: int,
    positions: int,
    step: int,
    temperature: float,
    temperatures: int,
    top_k: int,
    top_ks: int,
    top_p: float,
    top_ps: int,
    min_p: float,
    min_ps: int,
    k: int,
    tokens: int,  # int64* [n0 * n1, k]
    scores: int,  # float64* [n0 * n1, k], or 0
    threads: int,
    /,
) -> int: ...
def unmask(
    logits: int,
    dtype: int,
    rows: int,
    length: int,
    s0: int,
    s1: int,
    vocab: int,
    tokens: int,  # int64* [rows, length], read and written
    revealed: int,  # int64* [rows]
    mask_id: int,
    forbidden: int,  # int64*, or 0
    forbidden_count: int,
    probability: float,
    probabilities: int,  # float64*, one per row
    seed: int,
    seeds: int,
    row_ids: int,
    positions: int,
    step: int,
    temperature: float,
    temperatures: int,
    threads: int,
    /,
) -> int:
    """A bad row leaves `tokens` as they were."""

def transfer(
    tokens: int,  # int64* [rows, length], read and written
    drawn: int,  # int64* [rows, length]
    scores: int,  # [rows, length]
    dtype: int,  # of the scores: 0 or 1
    moved: int,  # uint8* [rows, length]
    rows: int,
    length: int,
    mask_id: int,
    begin: int,
    end: int,
    eligible: int,  # uint8* [rows, length], or 0
    rule: int,  # 0 count; 1 the count, and all that reach the threshold
    count: int,
    counts: int,  # int64*, one per row
    threshold: float,
    thresholds: int,  # float64*, one per row
    threads: int,
    /,
) -> None: ...
def lm_head_state_bytes() -> int:
    """Bytes of running state per draw for lm_head_tile; start from zeros."""

def lm_head_tile(
    tile: int,  # logits of tokens [begin, begin + columns), float32, row stride in elements
    draws: int,
    row_stride: int,
    begin: int,  # a multiple of 1024
    columns: int,  # a multiple of 1024 unless the tile is the last
    vocab: int,
    n1: int,
    first: int,  # index of the tile's first draw in the whole batch (streams are indexed from it)
    seed: int,
    seeds: int,
    row_ids: int,
    positions: int,
    step: int,
    temperature: float,
    temperatures: int,
    method: int,
    stats: int,  # 1: keep what the by-products need
    state: int,
    threads: int,
    /,
) -> int: ...
def lm_head_finish(
    state: int,
    draws: int,
    first: int,
    temperature: float,
    temperatures: int,
    tokens: int,  # int64* [draws]
    stats: int,  # float32 [4, stats_stride], or 0
    stats_stride: int,
    /,
) -> int: ...
