"""Masked discrete diffusion: networks, losses, likelihoods, training, and the samplers."""

from __future__ import annotations

from driftmax.discrete.ancestral import Ancestral, Euler
from driftmax.discrete.bytes_model import load_bytes_model
from driftmax.discrete.captured import CapturedLoop, LoopResult
from driftmax.discrete.decoding import (
    Confidence,
    DreamPace,
    EntropyBounded,
    EntropyOrder,
    EvenPace,
    Factor,
    MarginOrder,
    MaskGitPlus,
    Pace,
    RandomOrder,
    Threshold,
)
from driftmax.discrete.first_hitting import FirstHitting, HighOrderReveal, ParallelReveal
from driftmax.discrete.guidance import ClassifierFreeGuidance
from driftmax.discrete.likelihood import LikelihoodBound, exact_nll_bound, nll_bound
from driftmax.discrete.losses import lambda_dce, masked_nll, t_dce
from driftmax.discrete.network import RADD, RADDConfig
from driftmax.discrete.plan import Plan
from driftmax.discrete.pretrained import from_transformers
from driftmax.discrete.problem import Call, Denoiser, Problem, Sampler, SampleResult, State
from driftmax.discrete.remask import P2, Cap, ConfidenceBased, Loop, Remasking, ReMDM, Rescale
from driftmax.discrete.sample import sample
from driftmax.discrete.schedules import Cosine, Geometric, Linear, LogLinear, Polynomial, Schedule
from driftmax.discrete.scores import (
    NoiseConditioned,
    ScoreDenoiser,
    ScoreModel,
    absorbing_log_scores,
    denoiser_logits,
    uniform_log_scores,
)
from driftmax.discrete.svdd import SMC, SVDD, Argmax, Completion, LocalSoftmax, Selected, Selection
from driftmax.discrete.uniform import UniformAnalytic, UniformEuler

__all__ = [
    "P2",
    "RADD",
    "SMC",
    "SVDD",
    "Ancestral",
    "Argmax",
    "Call",
    "Cap",
    "CapturedLoop",
    "ClassifierFreeGuidance",
    "Completion",
    "Confidence",
    "ConfidenceBased",
    "Cosine",
    "Denoiser",
    "DreamPace",
    "EntropyBounded",
    "EntropyOrder",
    "Euler",
    "EvenPace",
    "Factor",
    "FirstHitting",
    "Geometric",
    "HighOrderReveal",
    "LikelihoodBound",
    "Linear",
    "LocalSoftmax",
    "LogLinear",
    "Loop",
    "LoopResult",
    "MarginOrder",
    "MaskGitPlus",
    "NoiseConditioned",
    "Pace",
    "ParallelReveal",
    "Plan",
    "Polynomial",
    "Problem",
    "RADDConfig",
    "RandomOrder",
    "ReMDM",
    "Remasking",
    "Rescale",
    "SampleResult",
    "Sampler",
    "Schedule",
    "ScoreDenoiser",
    "ScoreModel",
    "Selected",
    "Selection",
    "State",
    "Threshold",
    "UniformAnalytic",
    "UniformEuler",
    "absorbing_log_scores",
    "denoiser_logits",
    "exact_nll_bound",
    "from_transformers",
    "lambda_dce",
    "load_bytes_model",
    "masked_nll",
    "nll_bound",
    "sample",
    "t_dce",
    "uniform_log_scores",
]
