"""Makes one page of everything that is known of a dataset: its data, its stores, its runs and what they scored."""
