"""What lies at `data.path`: objects and files, what they are, which are used and what is left out."""
