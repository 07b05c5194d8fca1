"""Scores of a model: tasks through lm-eval, perplexity, labels. torch and transformers; no Ray, no MLflow."""
