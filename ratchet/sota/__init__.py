"""The comparison with other implementations of attention."""
