"""Attacks on what a finished run gives away, and measures of how much they get."""
