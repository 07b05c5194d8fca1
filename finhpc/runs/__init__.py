"""One training run: its folder, its workers, its progress and its result."""
