"""Measures the constants of the predictor on the GPU that is here."""
