"""The machine: its processors, its files, what the environment says."""
