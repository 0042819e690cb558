"""Passages found by meaning: `corpus` reads them, `encode` turns text into vectors, `index` finds the nearest."""
