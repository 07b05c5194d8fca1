"""What the workers of a run do together: average and divide, resume, stop."""
