"""What is asked of attention."""
