"""Measurements: each prints a table with its ratio to a limit. Run as `python -m benchmarks.NAME`."""
