"""Scripts that CI workflows run. They are not part of the wheel."""
