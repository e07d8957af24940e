"""From an encoded image to its crops."""
