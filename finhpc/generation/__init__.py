"""Text from a model: prompts, adapters, batches of requests over a cache in blocks, sampling."""
