"""Hanse: organisations train one model together while each keeps its data at home."""
