"""What is in a folder of weights or statistics, and what differs between two."""
