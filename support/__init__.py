"""Pages that support the six scripts. None of them is a script, and a reader of the method may skip them."""
