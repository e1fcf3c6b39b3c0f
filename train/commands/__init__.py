"""Is the commands that train, tabulate and show."""
