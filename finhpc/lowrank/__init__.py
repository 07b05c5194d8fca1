"""Low-rank layers, y = B(A x): the layers, their initialization, where they go in a model, factorization."""
