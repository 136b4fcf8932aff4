"""A prefix group of rollouts: one prompt and the scored responses sampled for it. Plain Python, token ids only."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class TokenCount(Sequence[int]):
    """Stands for token ids where only their number is known: has a length, and reading an id is an error.

    A rank that never reads token ids can be without them, see `mcore.tokens`. Packs are built alike from both.
    """

    num_tokens: int

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, index: Any) -> Any:
        raise ValueError(
            f"only the number of these tokens is known here ({self.num_tokens}), their ids are not; read ids on a "
            "rank that keeps them: tensor-parallel rank 0 of the first and the last pipeline stage"
        )


@dataclass(frozen=True, init=False)
class RolloutGroup:
    """One prompt and the G responses sampled for it. Immutable; sequences are stored as tuples.

    Args:
        prompt: token ids, at least one; or a `TokenCount`, as all responses then are.
        responses: G lists of token ids, at least one each.
        rewards: G finite numbers.
        group_id: a name used in messages and files.
        log_probs: the sampler's log-probabilities, one finite number per response token; for all responses or none.
        loss_masks: 0/1 (or bool) per response token, 0 for tokens that are not trained (outputs of tools); every
            response keeps at least one trained token. None for one response trains it in full.

    Raises:
        ValueError: anything else; the message names group, response, position and value, and the remedy.
    """

    prompt: Sequence[int]
    responses: tuple[Sequence[int], ...]
    rewards: tuple[float, ...]
    group_id: str | None
    log_probs: tuple[tuple[float, ...], ...] | None
    loss_masks: tuple[tuple[bool, ...], ...] | None

    def __init__(
        self,
        prompt: Sequence[int],
        responses: Sequence[Sequence[int]],
        rewards: Sequence[float],
        group_id: str | None = None,
        log_probs: Sequence[Sequence[float] | None] | None = None,
        loss_masks: Sequence[Sequence[int | bool] | None] | None = None,
    ) -> None:
        if group_id is not None and not isinstance(group_id, str):
            raise ValueError(f"group_id must be a string or None, got {reprlib.repr(group_id)}; write it as a string")
        group = _name(group_id)
        ids = token_ids(f"{group}, prompt", prompt)
        rows = [
            token_ids(f"{group}, response {i}", tokens)
            for i, tokens in enumerate(_sequence(f"{group}, responses", responses))
        ]
        if not rows:
            raise ValueError(f"{group} has no responses; drop the group or sample at least one response")
        check_all_known(group, [ids, *rows])
        scores = _sequence(f"{group}, rewards", rewards)
        if len(scores) != len(rows):
            raise ValueError(
                f"{group} has {len(scores)} rewards for {len(rows)} responses; give one reward per response"
            )
        numbers = [
            finite_number(f"{group}, reward {i}", r, "score the response again or drop it")
            for i, r in enumerate(scores)
        ]
        sampled = _per_token(group, "log_probs", log_probs, rows)
        masks = _per_token(group, "loss_masks", loss_masks, rows)
        object.__setattr__(self, "prompt", ids)
        object.__setattr__(self, "responses", tuple(rows))
        object.__setattr__(self, "rewards", tuple(numbers))
        object.__setattr__(self, "group_id", group_id)
        object.__setattr__(self, "log_probs", _log_probs(group, sampled))
        object.__setattr__(self, "loss_masks", _masks(group, masks, rows))

    def __len__(self) -> int:
        """Number of responses, G."""
        return len(self.responses)

    @property
    def trained_lengths(self) -> tuple[int, ...]:
        """Trained tokens of every response: its length, or the ones in its loss mask."""
        if self.loss_masks is None:
            return tuple(len(tokens) for tokens in self.responses)
        return tuple(sum(mask) for mask in self.loss_masks)

    def lengths_only(self, *, keep_log_probs: bool = False) -> RolloutGroup:
        """The same group where no token id is read: `TokenCount`s, with rewards and masks.

        ``keep_log_probs``: the sampler's log-probs too, which a rank that computes the loss needs.
        """
        counts = [TokenCount(len(tokens)) for tokens in self.responses]
        log_probs = self.log_probs if keep_log_probs else None
        prompt = TokenCount(len(self.prompt))
        return RolloutGroup(prompt, counts, self.rewards, self.group_id, log_probs, self.loss_masks)

    @classmethod
    def from_samples(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        rewards: Sequence[float],
        *,
        group_id: str | None = None,
        log_probs: Sequence[Sequence[float] | None] | None = None,
        loss_masks: Sequence[Sequence[int | bool] | None] | None = None,
    ) -> RolloutGroup:
        """A group from samples that each bring their own copy of the prompt.

        Raises:
            ValueError: the prompts are not the same tokens (names the first position that differs), or anything that
                the constructor refuses.
        """
        group = _name(group_id)
        copies = _sequence(f"{group}, prompts", prompts)
        if len(copies) != len(_sequence(f"{group}, responses", responses)):
            raise ValueError(
                f"{group} has {len(copies)} prompts for {len(responses)} responses; give one prompt per response"
            )
        if not copies:
            raise ValueError(f"{group} has no responses; drop the group or sample at least one response")
        first = token_ids(f"{group}, prompt of sample 0", copies[0])
        for i, prompt in enumerate(copies):
            same = token_ids(f"{group}, prompt of sample {i}", prompt)
            check_same_prompt(group_id, first, same, places=("sample 0", f"sample {i}"))
        return cls(first, responses, rewards, group_id, log_probs, loss_masks)


def check_vocabulary(groups: Iterable[RolloutGroup], vocab_size: int) -> None:
    """Refuses token ids that the model has no embedding for.

    Raises:
        ValueError: an id >= ``vocab_size``; names group, response, position and id.
    """
    for index, group in enumerate(groups):
        for number, tokens in enumerate((group.prompt, *group.responses)):
            if max(tokens) < vocab_size:
                continue
            position = next(t for t, token in enumerate(tokens) if token >= vocab_size)
            name = f"group {index}" + ("" if group.group_id is None else f" ({group.group_id!r})")
            part = "prompt" if number == 0 else f"response {number - 1}"
            raise ValueError(
                f"{name}, {part}, position {position}: token id {reprlib.repr(tokens[position])} is outside the "
                f"vocabulary of {vocab_size} tokens; tokenize with the tokenizer of this model"
            )


def check_all_known(where: str, sequences: Sequence[Sequence[int]]) -> None:
    """Raises ValueError when token ids are known of some of the sequences only."""
    unknown = sum(isinstance(tokens, TokenCount) for tokens in sequences)
    if 0 < unknown < len(sequences):
        raise ValueError(
            f"{where}: of {unknown} of {len(sequences)} sequences only the number of tokens is known; give the ids "
            "of all of them, or of none"
        )


def check_same_prompt(
    group_id: str | None, first: Sequence[int], other: Sequence[int], *, places: tuple[str, str]
) -> None:
    """Refuses two prompts of one group that are not the same tokens; ``places`` says where each was found.

    Raises:
        ValueError: they differ; names the first position that does.
    """
    if first == other:
        return
    shorter = min(len(first), len(other))
    position = next((t for t in range(shorter) if first[t] != other[t]), shorter)
    values = [reprlib.repr(ids[position]) if position < len(ids) else "no token" for ids in (first, other)]
    raise ValueError(
        f"different prompts under one {_name(group_id)}: position {position} is {values[0]} in {places[0]} "
        f"and {values[1]} in {places[1]} (lengths {len(first)} and {len(other)}); give each prompt its own group_id"
    )


def _name(group_id: str | None) -> str:
    return "group" if group_id is None else f"group {group_id!r}"


def _sequence(where: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValueError(
            f"{where} must be a list, got {type(value).__name__} {reprlib.repr(value)}; pass a list (.tolist())"
        )
    return value


def token_ids(where: str, value: Any) -> Sequence[int]:
    """``value`` as a tuple of token ids, at least one; a `TokenCount` as it is.

    Raises:
        ValueError: it is not; the message starts with ``where`` and names position and value.
    """
    if len(_sequence(where, value)) == 0:
        raise ValueError(f"{where} is empty; it needs at least one token")
    if isinstance(value, TokenCount):
        return value
    ids = tuple(value)
    if set(map(type, ids)) == {int} and min(ids) >= 0:  # without a step of Python per token
        return ids
    for position, token in enumerate(ids):
        if type(token) is not int or token < 0:  # type(), because True is an int too
            raise ValueError(
                f"{where}, position {position}: a token id must be an int of 0 or more, got {reprlib.repr(token)}; "
                "pass the tokenizer's ids as plain ints"
            )
    return ids


def finite_number(where: str, value: Any, remedy: str) -> float:
    """``value`` as a float. Raises ValueError when it is no finite number; the message has ``where`` and ``remedy``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{where} must be a number, got {reprlib.repr(value)}; {remedy}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} must be finite, got {reprlib.repr(value)}; {remedy}")
    return number


def _per_token(
    group: str, what: str, value: Any, responses: Sequence[Sequence[int]]
) -> list[Sequence[Any] | None] | None:
    """One list (or None) per response, with one value per token; None when no response has any."""
    if value is None:
        return None
    lists = list(_sequence(f"{group}, {what}", value))
    if len(lists) != len(responses):
        raise ValueError(f"{group} has {len(lists)} {what} for {len(responses)} responses; give one list per response")
    for i, (values, tokens) in enumerate(zip(lists, responses, strict=True)):
        if values is not None and len(_sequence(f"{group}, {what} {i}", values)) != len(tokens):
            raise ValueError(
                f"{group}, response {i} has {len(tokens)} tokens but {len(values)} {what}; give one per token"
            )
    return None if all(values is None for values in lists) else lists


def _log_probs(group: str, lists: list[Sequence[Any] | None] | None) -> tuple[tuple[float, ...], ...] | None:
    if lists is None:
        return None
    checked = []
    for i, values in enumerate(lists):
        if values is None:
            raise ValueError(f"{group}, response {i} has no log_probs but others have; give them for all or for none")
        where, remedy = f"{group}, response {i}, log_probs at position", "leave log_probs out if the sampler has none"
        checked.append(tuple(finite_number(f"{where} {t}", value, remedy) for t, value in enumerate(values)))
    return tuple(checked)


def _masks(
    group: str, lists: list[Sequence[Any] | None] | None, responses: Sequence[Sequence[int]]
) -> tuple[tuple[bool, ...], ...] | None:
    if lists is None:
        return None
    checked = []
    for i, (values, tokens) in enumerate(zip(lists, responses, strict=True)):
        mask = [1] * len(tokens) if values is None else values
        where = f"{group}, response {i}, loss_mask"
        for t, value in enumerate(mask):
            if type(value) not in (int, bool) or value not in (0, 1):
                raise ValueError(
                    f"{where} at position {t} must be 0 or 1, got {reprlib.repr(value)}; 1 trains the token"
                )
        if not any(mask):
            raise ValueError(f"{where} has no trained token (all {len(mask)} are 0); drop the response or keep a token")
        checked.append(tuple(bool(value) for value in mask))
    return tuple(checked)
