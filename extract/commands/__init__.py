"""Holds the commands that touch media, weights and stores; each imports what it needs when it runs."""
