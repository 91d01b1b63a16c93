"""A model of what attention takes on an A100, checked against published measurements."""
