"""The jobs of a sweep: processes of their own, what they know of each other, and their display."""
