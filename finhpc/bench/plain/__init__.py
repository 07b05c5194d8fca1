"""The plain ways that benchmarks compare with: transformers, peft and datasets without finhpc."""
