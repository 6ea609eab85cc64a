"""What is told of it all."""
