"""S3 and local files, and the names in a run directory."""
