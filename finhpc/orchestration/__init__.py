"""Runs on a Ray cluster: Ray Train around the training room, MLflow beside it, words on the screen."""
