"""Diagnose the estimators on inputs of the caller's own."""
