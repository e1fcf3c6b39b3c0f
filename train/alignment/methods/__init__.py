"""The methods of echoshift itself, one file each, whose name is the method's (`alignment.method` finds them)."""
