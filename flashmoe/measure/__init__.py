"""How figures are taken, and what they are compared with."""
