"""Where the numbers and pictures of a run go, and how they are read again."""
