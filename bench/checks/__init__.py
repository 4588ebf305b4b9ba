"""Conformance tests, one file per kind of model; `bench.check` runs them."""
