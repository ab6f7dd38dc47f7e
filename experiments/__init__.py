"""The papers' experiments, at a size that a CPU runs; the same scripts run larger ones on a GPU."""
