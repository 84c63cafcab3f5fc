"""Measurements of the product as it is deployed, one JSON line each: ``python -m benchmarks`` (or ``make bench``)."""
