"""What a study has found, and how sure it is."""
