"""MLflow: a run's journal is mirrored to it, and training never waits for it."""
