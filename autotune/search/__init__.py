"""Which tiles are tried, and what is remembered of them."""
