"""Back ends that write completions, and the contract that holds them all; imports nothing of ``learner``."""
