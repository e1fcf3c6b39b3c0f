"""Turns pixels and audio into features."""
