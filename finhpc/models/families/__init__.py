"""The model families, GPT-2, Llama, Mistral and Qwen2, and model shapes by name."""
