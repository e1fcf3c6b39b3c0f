"""Reads official annotation files into segments, one dataset a module."""
