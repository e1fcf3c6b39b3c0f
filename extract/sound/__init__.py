"""Turns samples into the two papers' spectrograms."""
