"""Diagnose the estimators on the caller's own inputs."""
