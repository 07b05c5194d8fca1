"""What models can do: scores on tasks, by lm-eval, and generated text. torch and transformers, no Ray, no MLflow."""
