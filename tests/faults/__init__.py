"""Faults in real processes, too slow for every day: ``make faults``."""
