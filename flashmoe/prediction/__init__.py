"""What is chosen without measuring: the time that a kernel is predicted to take for a problem."""
