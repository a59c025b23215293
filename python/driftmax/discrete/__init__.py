"""Masked discrete diffusion: networks, losses, likelihoods, training, and the samplers."""

from __future__ import annotations

from driftmax.discrete.ancestral import Ancestral, Euler
from driftmax.discrete.first_hitting import FirstHitting, ParallelReveal
from driftmax.discrete.plan import Plan
from driftmax.discrete.problem import Call, Denoiser, Problem, Sampler, SampleResult, State
from driftmax.discrete.sample import sample
from driftmax.discrete.schedules import Cosine, Geometric, Linear, LogLinear, Polynomial, Schedule

__all__ = [
    "Ancestral",
    "Call",
    "Cosine",
    "Denoiser",
    "Euler",
    "FirstHitting",
    "Geometric",
    "Linear",
    "LogLinear",
    "ParallelReveal",
    "Plan",
    "Polynomial",
    "Problem",
    "SampleResult",
    "Sampler",
    "Schedule",
    "State",
    "sample",
]
