"""What is made of many runs: methods compared, timed and planned, layers measured."""
