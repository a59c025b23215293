"""The benchmarks behind ``driftmax bench``: workloads, their peers, the machine's limit, correctness first.

A case (one file in ``cases/``) yields workloads. :mod:`~driftmax.bench.harness` gates each one, times
driftmax, the peers and the limit in turn, and turns the medians into tidy rows; :mod:`~driftmax.bench.report`
prints and stores them; :mod:`~driftmax.bench.plots` draws from the stored rows.
"""
