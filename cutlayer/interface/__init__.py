"""The functions that `cutlayer` offers to scripts and notebooks, see docs/python.md."""
