"""Reading and writing files: one module per kind of file."""
