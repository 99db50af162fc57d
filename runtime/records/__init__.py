"""What a run writes, shows and reports to trackers, and who owns the run's folder."""
