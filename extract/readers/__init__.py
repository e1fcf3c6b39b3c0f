"""Reads frames and samples, by time, from every form in which media lie on disk."""
