"""`ContractError`: what a check found."""

from __future__ import annotations

from aiovec.errors import AiovecError

__all__ = ["ContractError"]


class ContractError(AiovecError, AssertionError):
    """A vector, or an env, does not keep the contract.

    Attributes:
        check: The name of the check, as `check_vector_env` takes it in `skip`.
        where: In which step, of which env, in which leaf.
        expected: What should have come.
        got: What came.
        meaning: What that means for the author.
    """

    def __init__(self, check: str, where: str, expected: str, got: str, meaning: str) -> None:
        self.check = check
        self.where = where
        self.expected = expected
        self.got = got
        self.meaning = meaning
        super().__init__(f"check {check!r}, {where}: expected {expected}, got {got}. {meaning}")
