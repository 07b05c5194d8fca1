"""What a user can set: one file per command, and `base`, which makes settings of defaults, YAML and flags."""
