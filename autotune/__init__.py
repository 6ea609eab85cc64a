"""The tuner: finds the fastest correct tile for a problem on this machine and stores it.

`python -m flashmoe.autotune` is its command line.
"""
