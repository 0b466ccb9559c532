"""Attention over a packed sequence, on a CPU and on a GPU."""
