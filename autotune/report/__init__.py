"""Results as tables, JSON, lines to copy and an HTML page."""
