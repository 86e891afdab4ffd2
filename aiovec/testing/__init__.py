"""For tests of what is built on aiovec: an env that fails on demand, and the contract of a vector as a function.

    from aiovec.testing import FaultyEnv, check_vector_env

`import aiovec` does not import it.
"""

from __future__ import annotations

from aiovec.testing.contract import check_vector_env
from aiovec.testing.contract_error import ContractError
from aiovec.testing.faulty_env import FaultyEnv

__all__ = ["ContractError", "FaultyEnv", "check_vector_env"]
