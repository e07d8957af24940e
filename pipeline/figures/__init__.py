"""Pictures: crops, attention, and the colours of all of them."""
