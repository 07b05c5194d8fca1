"""Text from a model: prompts, adapters, the cached decoder, sampling."""
