"""What the features of a frozen backbone are worth."""
