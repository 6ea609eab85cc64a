"""What CI runs beside the ratchet. Not part of the wheel."""
