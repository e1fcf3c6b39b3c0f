"""Holds one network a file, each with its preprocessing, its split and its named outputs."""
