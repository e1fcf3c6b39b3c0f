"""Trains on cached features, whatever the method: rows in memory, batches, the loop, stacks of runs."""
