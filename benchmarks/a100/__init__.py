"""Models of what the kernels take on an A100, checked against published measurements."""
