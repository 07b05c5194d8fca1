"""Model folders on disk: weights, config, tokenizer and manifest, in safetensors or GGUF."""
