"""Parts of `finhpc bench serve`: servers as processes, users that load them, and what the users saw."""
