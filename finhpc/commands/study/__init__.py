"""`finhpc study`: variants of one run, screened on few steps; the best are trained on several seeds."""
