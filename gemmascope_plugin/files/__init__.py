"""Files as such: read with suspicion, written whole, locked against other processes."""
