"""Clients of one run in several processes of this machine."""
