"""Benchmarks: each prints a table with its limits, and exits with 1 if one is exceeded.

Run one with `python -m benchmarks.NAME`, and those of docs/development/benchmarks.md with `make bench`.
"""
