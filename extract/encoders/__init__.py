"""One network a file, each with its preprocessing, its split, its named outputs and its inference form."""
