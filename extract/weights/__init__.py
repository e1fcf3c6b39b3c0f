"""Finds, converts and checks the weights of the encoders."""
