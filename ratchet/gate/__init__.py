"""Whether a kernel got slower. Pure."""
