"""The sampler contract as checks, for our back ends and for anyone else's."""

from sampler.conformance.harness import ContractError, Harness
from sampler.conformance.suite import CHECKS, check_sampler

__all__ = ["CHECKS", "ContractError", "Harness", "check_sampler"]
