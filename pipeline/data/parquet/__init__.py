"""Parquet shards: columns, row groups and rows."""
