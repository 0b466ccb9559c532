"""vLLM in this process: its arguments, what runs in its worker, and what it stores of the weights."""
