"""One file per command of `shoal`."""
