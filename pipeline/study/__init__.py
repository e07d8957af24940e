"""Studies: which settings are good, by trials that are runs of their own; searched, remembered, and found."""
