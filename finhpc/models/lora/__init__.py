"""LoRA adapters on a frozen, perhaps quantized base, and their files in peft's format."""
