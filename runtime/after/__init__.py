"""What is measured once training is over, and the programs that measure finished runs."""
