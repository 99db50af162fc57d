"""What a configuration costs before it is run: cuts, the closed form of its bytes, a metered step."""
