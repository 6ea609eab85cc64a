"""Who won."""
