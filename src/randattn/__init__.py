"""Softmax attention and its Monte Carlo estimators, on any array library."""

from ._eva import eva
from ._lara import lara
from ._ra import ra
from ._rfa import rfa
from ._softmax import softmax_attention

__all__ = ["eva", "lara", "ra", "rfa", "softmax_attention"]
