#!/usr/bin/env bash
# Everything there is to see on a GPU machine, in one command and well under ten minutes: bench/gpu.sh [RESULTS] [arguments of
# gpu_checks.py]. Nothing is taken from the network. Where the compiled core does not build, the reference and the kernels
# run without it, and the log says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-bench/results/gpu}
shift || true
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1

run() {
    local status=0
    printf '\n=== %s (%d s)\n' "$1" "$SECONDS"
    shift
    "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        printf '=== failed with status %d\n' "$status"
        failures=$((failures + 1))
    fi
}

main() {
    failures=0
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory --format=csv
    fi
    if "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps --target "$work/site" \
        --config-settings=build-dir="$work/build" . >"$out/build.log" 2>&1; then
        echo "compiled core: built"
        export PYTHONPATH="$work/site"
    else
        echo "compiled core: did not build (see build.log); going on without it"
        export PYTHONPATH="$PWD/python"
    fi
    if "$PYTHON" -c "import pytest" 2>/dev/null; then
        run "kernel suite" env DRIFTMAX_TEST_DEVICE="${DRIFTMAX_TEST_DEVICE:-cuda}" \
            "$PYTHON" -m pytest -q -p no:cacheprovider --durations=5 tests/kernels/suite.py
    else
        echo "pytest is not installed: the kernel suite is not run, the checks below are"
    fi
    run "checks and timings" "$PYTHON" bench/gpu_checks.py --out "$out" "$@"
    printf '\n=== done, %d failures (%d s)\n' "$failures" "$SECONDS"
    [ "$failures" -eq 0 ]
}

main "$@" 2>&1 | tee "$out/gpu.log"
