"""`finhpc decompose`: a dense model in, a low-rank model of its best factors out."""
