"""Measurements: ``python -m benchmarks.NAME`` prints a table and ends with one line ``RESULT {json}``."""
