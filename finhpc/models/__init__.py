"""Hugging Face models: built, cut into pipeline layers, loaded and saved."""
