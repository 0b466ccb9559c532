"""vLLM as a server of its own: its client, its HTTP calls and the command that starts it."""
