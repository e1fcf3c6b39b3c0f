"""What a researcher looks at: figures of features and networks, all that is known of one segment, the report."""
