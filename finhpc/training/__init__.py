"""Training without Ray: the DeepSpeed engine, the loop, checkpoints, the journal."""
