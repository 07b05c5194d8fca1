"""LoRA adapters over a frozen, perhaps quantized, base; in peft's format on disk."""
