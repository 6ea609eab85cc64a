"""How a candidate runs: compiled, checked and timed, in a process of its own."""
