"""The sampler contract as tests, for our back ends and for anyone else's."""

from sampler.conformance.suite import CHECKS, ContractError, Env, check_sampler

__all__ = ["CHECKS", "ContractError", "Env", "check_sampler"]
