"""Holds the measurements: each script gives a ratio against a named reference taken in the same run."""
