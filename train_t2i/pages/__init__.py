"""What every HTML page of ours is made of: one file, nothing loaded from anywhere, every word from a run escaped."""
