"""The command line: one module a command, thin callers of the library."""
