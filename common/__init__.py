"""Types, contracts, configuration and helpers that every other part shares; imports nothing of ours."""
