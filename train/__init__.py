"""Learns from cached features and says what it scored."""
