"""One file per framework; each imports its own, and the library none."""
