"""What differs between model families: GPT-2, Llama, Mistral, Qwen2; and shapes by name."""
