"""An error in one rank's forward ends the step on all ranks, without a rank that waits for another forever.

A rank that stopped in the middle of a pipeline schedule would leave its neighbours in a receive, and the next step
among the messages of this one. So an error is kept, the rank goes through the rest of the step with empty
micro-batches, and at the end of the step every rank raises: the one that failed its own error, the others its words.
"""

from __future__ import annotations

from types import TracebackType

import torch
from megatron.core import parallel_state

from megatron_prefix.collectives import Group, all_gather_object, all_reduce_max


class StepErrors:
    """The first error of this rank in a step. Use `during` around what may fail, and `raise_first` at the end.

    Only errors that all tensor- and context-parallel ranks of a stage meet alike (a wrong pack, a wrong layout) can end
    a step this way: a rank that fails alone leaves its peers in a collective until that times out.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.number = 0

    def during(self, number: int) -> StepErrors:
        """A context manager that keeps an error of micro-batch ``number``."""
        self.number = number
        return self

    def __enter__(self) -> StepErrors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self.error = error
            return True
        return False

    def raise_first(self, device: torch.device, *, forward_only: bool) -> None:
        """Raise on every rank when any rank of the model kept an error, on any data-parallel replica in training.

        The first is that of the lowest micro-batch and stage; others may follow from it. Replicas need not make the
        same number of forward-only passes, so those do not wait for each other.

        Raises:
            Exception: the rank's own error, where it is the first.
            RuntimeError: the words of the first error, with its stage and micro-batch.
        """
        groups: list[Group] = [
            parallel_state.get_model_parallel_group(),
            parallel_state.get_context_parallel_group()
            if forward_only
            else parallel_state.get_data_parallel_group(with_context_parallel=True),
        ]
        failed = torch.tensor([float(self.error is not None)], device=device)
        for group in groups:
            failed = all_reduce_max(failed, group)
        if not failed.item():
            return
        stage = parallel_state.get_pipeline_model_parallel_rank()
        mine = None if self.error is None else (self.number, stage, f"{type(self.error).__name__}: {self.error}")
        found = [mine]
        for group in groups:
            found = [each for part in all_gather_object(found, group) for each in part]
        first = min(each for each in found if each is not None)
        if self.error is not None and mine == first:
            raise self.error
        raise RuntimeError(
            f"the step failed in micro-batch {first[0]} on pipeline stage {first[1]}: {first[2]}"
        ) from self.error
