"""Measurements of mtpdecode on the real model. Run one with `python -m benchmarks.NAME`; see `benchmarks/README.md`."""
