"""Pictures: crops, attention maps, and the colours of all pictures."""
