"""Draws what features and networks look like, as matplotlib figures with the numbers behind them."""
