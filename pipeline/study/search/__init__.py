"""Ray Tune: proposing settings, and ending trials."""
