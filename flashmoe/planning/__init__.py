"""Which backend and tile run a problem."""
