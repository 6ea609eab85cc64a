"""flashmoe inside other libraries: one call each, undone by its counterpart."""
