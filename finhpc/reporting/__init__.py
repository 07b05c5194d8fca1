"""The report: the paper's tables and figures from what MLflow holds, its own beside them. No Ray, no torch."""
