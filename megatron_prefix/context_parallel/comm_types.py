"""Names of the ways in which keys reach queries, and which heads a rank computes where heads are swapped for rows."""

from __future__ import annotations

from dataclasses import dataclass

COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")

Heads = tuple[int, ...]


def check_comm_type(comm_type: str) -> None:
    """Raises ValueError for anything but one of `COMM_TYPES`."""
    if comm_type not in COMM_TYPES:
        raise ValueError(f"unknown cp_comm_type {comm_type!r}; choose one of {', '.join(COMM_TYPES)}")


@dataclass(frozen=True)
class HeadSplit:
    """The heads of each rank of a group that swaps heads for rows.

    Attributes:
        query_heads: of each rank, an equal share.
        key_heads: the key-value heads that those read, for the kernel's even grouping of query heads: each once where
            the query heads share them evenly, else one per query head. With fewer key-value heads than ranks, several
            ranks hold the same one.
    """

    query_heads: tuple[Heads, ...]
    key_heads: tuple[Heads, ...]

    @classmethod
    def build(cls, query_heads: int, key_heads: int, num_ranks: int) -> HeadSplit:
        """Split heads over ``num_ranks``.

        Raises:
            ValueError: query heads that do not divide by the ranks.
        """
        if query_heads % num_ranks:
            raise ValueError(
                f"cp_comm_type a2a needs query heads that divide by its {num_ranks} ranks, got {query_heads}; use p2p"
            )
        each = query_heads // num_ranks
        shares = tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(num_ranks))
        return cls(shares, tuple(_key_heads(heads, query_heads, key_heads) for heads in shares))


def _key_heads(heads: Heads, query_heads: int, key_heads: int) -> Heads:
    read = tuple(head * key_heads // query_heads for head in heads)
    once = tuple(sorted(set(read)))
    evenly = len(heads) % len(once) == 0 and read == tuple(sorted(once * (len(heads) // len(once))))
    return once if evenly else read
