#!/usr/bin/env bash
# Everything there is to see on a GPU machine, in one command and well under ten minutes: bench/gpu.sh [RESULTS].
# Nothing is taken from the network. First, side by side: the kernel suite, the checks, a run of every timed call
# (both compile the kernels), and the build of the compiled core. Then, alone, the timings, and the core on this
# machine's CPU. Where the core does not build, the reference and the kernels run without it.
# DRIFTMAX_GPU_ARGS="--device cpu" with TRITON_INTERPRET=1 is a dry run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-bench/results/gpu}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
read -ra arguments <<<"${DRIFTMAX_GPU_ARGS:-}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
failures=0

# start NAME COMMAND...: in the background, its output in $out/NAME.log
names=() pids=()
start() {
    names+=("$1")
    "${@:2}" >"$out/$1.log" 2>&1 &
    pids+=($!)
}

# Wait for all that was started; the ends of their logs.
collect() {
    local k status
    for k in "${!pids[@]}"; do
        status=0
        wait "${pids[$k]}" || status=$?
        printf '=== %s: status %d (%d s)\n' "${names[$k]}" "$status" "$SECONDS"
        grep -E '^(FAIL|FAILED|ERROR|E  )|passed|failed' "$out/${names[$k]}.log" | head -40 || true
        [ "$status" -eq 0 ] || failures=$((failures + 1))
    done
    names=() pids=()
}

build() {
    "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --target "$work/site" \
        --config-settings=build-dir="$work/build" .
}

# What the compiled core does on this machine's CPU, which may have instructions that others lack.
core() (
    set -e
    export PYTHONPATH="$work/site"
    "$python" -m driftmax doctor
    "$python" -m pytest -q -p no:cacheprovider tests/test_invariance.py tests/test_threads.py
    "$python" -m pytest -q -p no:cacheprovider -m gpu tests/discrete
    local threads
    for threads in 2 8; do
        "$python" -m driftmax bench --quick --case categorical fill --threads "$threads" --csv "$out/cpu_$threads.csv"
    done
)

main() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory --format=csv
    fi
    lscpu | grep -E 'Model name|^CPU\(s\)' || true
    local group suite=(env DRIFTMAX_TEST_DEVICE="${DRIFTMAX_TEST_DEVICE:-cuda}" "$python" -m pytest -q
        -p no:cacheprovider --durations=5)
    if "$python" -c "import xdist" 2>/dev/null; then suite+=(--numprocesses 6); fi
    start suite "${suite[@]}" tests/kernels/suite.py tests/kernels/suite_steps.py
    for group in fill categorical law capture head steps samplers uniform guided loops captured networks; do
        start "checks_$group" "$python" -m driftmax.bench.gpu checks "$group" --out "$out" "${arguments[@]}"
    done
    for group in fill categorical gumbel_topk head steps discrete; do
        start "warm_$group" "$python" -m driftmax.bench.gpu warm "$group" --out "$out" "${arguments[@]}"
    done
    start build build
    collect
    "$python" -m driftmax.bench.gpu speed --out "$out" "${arguments[@]}" || failures=$((failures + 1))
    printf '=== timed (%d s)\n' "$SECONDS"
    start core core
    collect
    printf '=== done, %d failures (%d s)\n' "$failures" "$SECONDS"
    [ "$failures" -eq 0 ]
}

main 2>&1 | tee "$out/gpu.log"
