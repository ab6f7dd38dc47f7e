"""Softmax attention and its Monte Carlo estimators, on any array library."""

from ._core.average import Average
from ._estimators.adaptive_eva import adaptive_eva
from ._estimators.adaptive_eva_state import AdaptiveEVAState
from ._estimators.adaptive_eva_step import adaptive_eva_step
from ._estimators.eva import eva
from ._estimators.eva_step import EVAState, eva_step
from ._estimators.lara import lara
from ._estimators.primitives import attend, merge
from ._estimators.ra import ra
from ._estimators.rfa import RFAState, rfa, rfa_step
from ._estimators.softmax import softmax_attention
from ._study.costs import multiply_adds
from ._study.diagnose import Diagnosis, diagnose

__version__ = "0.1.0"

__all__ = [
    "AdaptiveEVAState",
    "Average",
    "Diagnosis",
    "EVAState",
    "RFAState",
    "adaptive_eva",
    "adaptive_eva_step",
    "attend",
    "diagnose",
    "eva",
    "eva_step",
    "lara",
    "merge",
    "multiply_adds",
    "ra",
    "rfa",
    "rfa_step",
    "softmax_attention",
]
