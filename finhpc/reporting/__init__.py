"""The report: the paper's tables and figures from what MLflow holds, the paper's figures beside ours. No Ray, no torch."""
