"""Side-by-side measurements: finhpc against the fastest plain way to do the same work, in one call."""
