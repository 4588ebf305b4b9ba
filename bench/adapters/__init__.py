"""One file per family of models; each importable alone."""
