"""What a segment is, where its features live and who runs the work."""
