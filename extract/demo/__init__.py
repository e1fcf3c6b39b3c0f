"""Generates the synthetic demo data set."""
