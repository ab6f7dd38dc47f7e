"""Compare the estimators: errors, times, agreement between libraries."""
