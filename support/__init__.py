"""What the six pages rest on, and a reader of the method may skip."""
