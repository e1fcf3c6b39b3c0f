"""Turns pixels and sound into features."""
