"""Which problems are tuned, in what time, and what tuning one of them is."""
