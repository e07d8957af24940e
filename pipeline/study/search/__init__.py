"""Ray Tune: who proposes settings, and who ends trials."""
