# SPDX-License-Identifier: Apache-2.0
"""What a text must contain: constraints for beam search, and a beam's progress through a list of them.

Names, methods and attributes are the ecosystem's, so that constraints written for it work here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pretrained.errors import GenerationError

if TYPE_CHECKING:
    from pretrained.core.generation_config import GenerationConfig

_PATIENCE = 10_000


class Constraint(ABC):
    """Something that is fulfilled by certain tokens in a row.

    A subclass sets `seqlen`, the most tokens it takes, defines the methods below and calls
    ``super().__init__()`` last, which tries it out.

    Raises:
        GenerationError: it does not follow its own advice, or is never fulfilled by it.
    """

    seqlen: int

    def __init__(self) -> None:
        self.test()

    def test(self) -> None:
        """Follow the constraint's own advice to its end, once from the middle.

        Raises:
            GenerationError: that does not lead there.
        """
        trial, completed = self.copy(), False
        for step in range(_PATIENCE):
            if step == 1:
                trial.reset()
            advice = trial.advance()
            token = advice[0] if isinstance(advice, Sequence) and advice else advice
            if not isinstance(token, int) or not trial.does_advance(token):
                raise _broken(self, "advance() names a token that does_advance() denies")
            _, completed, _ = trial.update(token)
            if completed:
                break
        if not completed or trial.remaining() != 0:
            raise _broken(self, "following advance() never completes it")

    @abstractmethod
    def advance(self) -> int | list[int] | None:
        """Return the token that comes next, or several of which one does; None when completed."""

    @abstractmethod
    def does_advance(self, token_id: int) -> bool:
        """Return whether a token is a step forward.

        Args:
            token_id: The token.
        """

    @abstractmethod
    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        """Take in a token; return whether it was a step forward, completed all, or undid the progress.

        Args:
            token_id: The token.
        """

    @abstractmethod
    def reset(self) -> None:
        """Begin again."""

    @abstractmethod
    def remaining(self) -> int:
        """Return how many tokens are still needed, at most."""

    @abstractmethod
    def copy(self, stateful: bool = False) -> Any:
        """Return a new constraint of the same kind.

        Args:
            stateful: With the progress made so far.
        """


class PhrasalConstraint(Constraint):
    """A phrase: these tokens, one right after the other.

    Args:
        token_ids: The tokens.

    Raises:
        GenerationError: no tokens, or something that is no token id.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = _ids(token_ids, "token_ids")
        self.seqlen = len(self.token_ids)
        self.fulfilled_idx = -1
        self.completed = False

    def advance(self) -> int | None:
        """Return the next token of the phrase; None when it is complete."""
        return None if self.completed else self.token_ids[self.fulfilled_idx + 1]

    def does_advance(self, token_id: int) -> bool:
        """Return whether a token is the phrase's next.

        Args:
            token_id: The token.
        """
        return not self.completed and token_id == self.advance()

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        """Take in a token; return whether it was a step forward, completed all, or undid the progress.

        Args:
            token_id: The token.
        """
        if not self.does_advance(token_id):
            self.reset()
            return False, False, True
        self.fulfilled_idx += 1
        self.completed = self.fulfilled_idx == self.seqlen - 1
        return True, self.completed, False

    def reset(self) -> None:
        """Begin again."""
        self.fulfilled_idx, self.completed = -1, False

    def remaining(self) -> int:
        """Return how many tokens are still needed."""
        return self.seqlen - (self.fulfilled_idx + 1)

    def copy(self, stateful: bool = False) -> PhrasalConstraint:
        """Return a new constraint for the same phrase.

        Args:
            stateful: With the progress made so far.
        """
        new = PhrasalConstraint(self.token_ids)
        if stateful:
            new.fulfilled_idx, new.completed = self.fulfilled_idx, self.completed
        return new


class DisjunctiveConstraint(Constraint):
    """One of several phrases.

    Args:
        nested_token_ids: The tokens of each phrase; none may be the beginning of another.

    Raises:
        GenerationError: no phrases, an empty one, or one that begins another.
    """

    def __init__(self, nested_token_ids: Sequence[Sequence[int]]) -> None:
        self.token_ids = [_ids(ids, "nested_token_ids") for ids in nested_token_ids]
        if not self.token_ids:
            raise GenerationError("A choice of phrases needs phrases", where="nested_token_ids", found="none")
        for index, one in enumerate(self.token_ids):
            for other in self.token_ids[index + 1 :]:
                shorter, longer = sorted((one, other), key=len)
                if longer[: len(shorter)] == shorter:
                    raise GenerationError(
                        "A phrase is the beginning of another one, so the longer would never be needed",
                        where="nested_token_ids",
                        found=f"{shorter} and {longer}",
                        mend="Leave the longer one out.",
                    )
        self.seqlen = max(map(len, self.token_ids))
        self.current_seq: list[int] = []
        self.completed = False

    def advance(self) -> list[int] | None:
        """Return the tokens with which a phrase goes on; None when one is complete."""
        done = len(self.current_seq)
        going = [ids for ids in self.token_ids if ids[:done] == self.current_seq and len(ids) > done]
        return list(dict.fromkeys(ids[done] for ids in going)) or None

    def does_advance(self, token_id: int) -> bool:
        """Return whether a phrase goes on with a token.

        Args:
            token_id: The token.
        """
        return token_id in (self.advance() or ())

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        """Take in a token; return whether it was a step forward, completed a phrase, or undid the progress.

        Args:
            token_id: The token.
        """
        if not self.does_advance(token_id):
            self.reset()
            return False, False, True
        self.current_seq = [*self.current_seq, token_id]
        self.completed = self.current_seq in self.token_ids
        return True, self.completed, False

    def reset(self) -> None:
        """Begin again."""
        self.current_seq, self.completed = [], False

    def remaining(self) -> int:
        """Return how many tokens are still needed, for the longest phrase."""
        return 0 if self.completed else self.seqlen - len(self.current_seq)

    def copy(self, stateful: bool = False) -> DisjunctiveConstraint:
        """Return a new constraint for the same phrases.

        Args:
            stateful: With the progress made so far.
        """
        new = DisjunctiveConstraint(self.token_ids)
        if stateful:
            new.current_seq, new.completed = list(self.current_seq), self.completed
        return new


class ConstraintListState:
    """A beam's progress through a list of constraints, one at a time, in any order.

    Args:
        constraints: All that must be fulfilled.
    """

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        self.constraints = list(constraints)
        self.max_seqlen = max(constraint.seqlen for constraint in self.constraints)
        self.n_constraints = len(self.constraints)
        self.init_state()

    def init_state(self) -> None:
        """Forget all progress."""
        self.completed = False
        self.complete_constraints: list[Constraint] = []
        self.inprogress_constraint: Constraint | None = None
        self.pending_constraints: list[Constraint] = [one.copy() for one in self.constraints]

    def get_bank(self) -> int:
        """Return how far the beam has come, in tokens; every constraint counts as much as the longest."""
        begun = self.inprogress_constraint
        part = 0 if begun is None else self.max_seqlen - begun.remaining()
        return len(self.complete_constraints) * self.max_seqlen + part

    def advance(self) -> list[int] | None:
        """Return the tokens with which it goes on: of the constraint begun, or of all that are left."""
        begun = self.inprogress_constraint
        tokens: list[int] = []
        for constraint in self.pending_constraints if begun is None else [begun]:
            advice = constraint.advance()
            if advice is not None:
                tokens += [advice] if isinstance(advice, int) else advice
        return tokens or None

    def reset(self, token_ids: Iterable[int] | None) -> None:
        """Begin again with these tokens.

        Args:
            token_ids: All tokens so far; None for none.
        """
        self.init_state()
        for token in token_ids or ():
            self.add(token)
            if self.completed:
                break

    def add(self, token_id: int) -> tuple[bool, bool]:
        """Take in a token; return whether it completed a constraint, and whether it was a step forward.

        A token that undoes the progress of a constraint is not the first one of another.

        Args:
            token_id: The token.
        """
        if self.completed:
            return True, False
        begun = self.inprogress_constraint
        if begun is None:
            begun = next((one for one in self.pending_constraints if one.does_advance(token_id)), None)
            if begun is None:
                return False, False
            self.pending_constraints = [one for one in self.pending_constraints if one is not begun]
            self.inprogress_constraint = begun
        stepped, complete, undone = begun.update(token_id)
        if undone:
            self.pending_constraints.append(begun.copy())
            self.inprogress_constraint = None
        elif complete:
            self.complete_constraints.append(begun)
            self.inprogress_constraint = None
            self.completed = not self.pending_constraints
        return complete, stepped

    def copy(self, stateful: bool = True) -> ConstraintListState:
        """Return a new state for the same constraints.

        Args:
            stateful: With the progress made so far.
        """
        new = ConstraintListState(self.constraints)
        if stateful:
            begun = self.inprogress_constraint
            new.completed = self.completed
            new.complete_constraints = [one.copy(stateful=True) for one in self.complete_constraints]
            new.inprogress_constraint = None if begun is None else begun.copy(stateful=True)
            new.pending_constraints = [one.copy() for one in self.pending_constraints]
        return new


def constraints_of(config: GenerationConfig) -> list[Constraint]:
    """Return the constraints that a config's `constraints` and `force_words_ids` ask for.

    Args:
        config: A generation config.
    """
    forced = [
        PhrasalConstraint(words) if isinstance(words[0], int) else DisjunctiveConstraint(words)
        for words in config.force_words_ids or ()
    ]
    return [*(config.constraints or ()), *forced]


def _ids(token_ids: Any, where: str) -> list[int]:
    ids = list(token_ids) if isinstance(token_ids, list | tuple) else []
    if not ids or any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in ids):
        raise GenerationError(
            "A phrase is a list of token ids",
            where=where,
            expected="whole numbers of 0 or more",
            found=token_ids,
        )
    return ids


def _broken(constraint: Constraint, why: str) -> GenerationError:
    return GenerationError(f"{type(constraint).__name__} is not a working constraint: {why}")
