"""The sampler contract as tests, for our back ends and for anyone else's."""

from sampler.conformance.suite import CHECKS, ContractError, Harness, check_sampler

__all__ = ["CHECKS", "ContractError", "Harness", "check_sampler"]
