"""Data sets written in another form, a part at a time."""
