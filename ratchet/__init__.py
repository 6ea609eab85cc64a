"""The ratchet: measure against SDPA, compare with a baseline, and let no kernel get slower."""
