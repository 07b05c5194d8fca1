"""Low-rank models in vLLM, with their factors."""
