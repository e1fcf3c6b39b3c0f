"""What looks over an installation: environment, decoders, places and data."""
