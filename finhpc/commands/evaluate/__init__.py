"""`finhpc evaluate`: models scored on tasks, side by side on the Ray cluster."""
