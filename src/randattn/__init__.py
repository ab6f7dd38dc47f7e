"""Softmax attention and its Monte Carlo estimators, on any array library."""

from ._attend import Average
from ._counts import multiply_adds
from ._diagnose import Diagnosis, diagnose
from ._eva import eva
from ._eva_step import EVAState, eva_step
from ._lara import lara
from ._primitives import attend, merge
from ._ra import ra
from ._rfa import RFAState, rfa, rfa_step
from ._softmax import softmax_attention

__all__ = [
    "Average",
    "Diagnosis",
    "EVAState",
    "RFAState",
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
