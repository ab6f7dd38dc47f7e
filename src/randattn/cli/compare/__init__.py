"""Compare the estimators: errors, times, agreement."""
