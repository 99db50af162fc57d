"""From the command line to a run, or to the jobs of a sweep."""
