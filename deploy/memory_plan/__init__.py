"""Whether a run fits into memory, and the cheapest change that makes it fit."""
