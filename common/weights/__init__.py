"""Weights on their way from the learner to the sampler: handles, fingerprints and the broadcast."""
