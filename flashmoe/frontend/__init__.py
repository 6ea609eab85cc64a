"""Between users and plans: what is allowed, and what torch sees of attention."""
