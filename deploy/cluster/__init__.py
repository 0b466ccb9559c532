"""Several processes on several machines, by Ray."""
