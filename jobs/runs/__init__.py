"""What the commands that have a run in hand share."""
