"""Words, contracts, configuration and plain plumbing that every other part shares; imports nothing of ours."""
