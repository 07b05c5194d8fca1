"""Hugging Face models: shapes by name, cut into pipeline layers, saved and loaded."""
