"""Ray: connect or start, check that it works, place workers, find the network."""
