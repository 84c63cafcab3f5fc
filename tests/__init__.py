"""The tests; they mirror the package, one module each."""
