"""What a study shares with its trials."""
