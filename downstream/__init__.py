"""What a backbone is good for."""
