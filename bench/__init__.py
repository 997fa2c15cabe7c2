"""What a verdict costs and how good it is, measured on this machine."""
