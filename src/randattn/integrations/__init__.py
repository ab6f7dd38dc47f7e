"""Integrations of the estimators in frameworks: a module for each framework, imported by its name alone."""
