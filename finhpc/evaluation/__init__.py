"""Scores of models on tasks, by lm-eval: no Ray, no MLflow."""
