"""The estimators where frameworks look for attention: a module each, imported by name alone."""
