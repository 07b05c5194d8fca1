"""Choices among candidate answers: what the candidates of an example are, and packs of them."""
