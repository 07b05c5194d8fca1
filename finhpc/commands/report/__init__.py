"""`finhpc report`: the paper's tables and figures from what MLflow stores. No Ray, no torch."""
