"""What models can do: generated text and scores. torch and transformers, no Ray."""
