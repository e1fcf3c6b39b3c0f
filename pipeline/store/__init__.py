"""Keeps features on disk, one interface over two backends."""
