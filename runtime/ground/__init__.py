"""What everything stands on and what knows nothing of parties: configuration, files, text, processes, randomness."""
