"""Parquet: a row is what a line is in JSON Lines, with the same keys as columns.

=============  ==================================  =============================================
record         columns                             types
=============  ==================================  =============================================
group          group_id, prompt                    string, list<int64>
               responses                           list<struct<tokens: list<int64>,
                                                   reward: double, log_probs: list<double>,
                                                   loss_mask: list<int64>>>
sample         group_id, prompt, response          string, list<int64>, list<int64>
               reward, log_probs, loss_mask        double, list<double>, list<int64 or bool>
trajectory     group_id, tokens, generated         string, list<int64>, list<int64 or bool>
               reward, log_probs, trajectory_id    double, list<double>, string
=============  ==================================  =============================================

Columns that are optional in JSON Lines may be missing or null; integers may be of any width. Other columns are ignored.
A file's row groups are read one after another, `BATCH_ROWS` rows at a time; where one cannot be decoded its remaining
rows count as one bad row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_prefix.formats.assemble import Load

BATCH_ROWS = 256
MOST_METADATA_BYTES = 2**26
"""Of one string, and entries of one list, in a file's footer: a damaged length must not take memory."""


def parquet_rows(file: str) -> Iterator[tuple[int, Load]]:
    """Row numbers, counted from 1, and what gives each row.

    Raises:
        ValueError: the file cannot be read or is not Parquet.
        ImportError: pyarrow is not installed.
    """
    arrow, parquet = _import()
    try:
        opened = parquet.ParquetFile(
            file,
            thrift_string_size_limit=MOST_METADATA_BYTES,
            thrift_container_size_limit=MOST_METADATA_BYTES,
            page_checksum_verification=True,
        )
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot read Parquet: {_first_line(error)}") from error
    number = 0
    with opened:
        for group in range(opened.num_row_groups):
            start = number
            try:
                for batch in opened.iter_batches(batch_size=BATCH_ROWS, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, partial(_without_nulls, row)
            except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
                number += 1
                yield number, partial(_refuse, f"row group {group} cannot be read from here: {_first_line(error)}")
            number = max(number, start + opened.metadata.row_group(group).num_rows)


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows; a key that a row lacks is null in it.

    Raises:
        ValueError: values of one key are of different types.
        ImportError: pyarrow is not installed.
    """
    arrow, parquet = _import()
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = arrow.table({name: arrow.array([row.get(name) for row in rows]) for name in names})
    except arrow.ArrowException as error:
        raise ValueError(f"{file}: the values do not fit into columns: {_first_line(error)}") from error
    parquet.write_table(table, file, compression="zstd", write_page_checksum=True)


def _import() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need the cli extra: pip install 'megatron-prefix[cli]'") from error
    return pyarrow, pyarrow.parquet


def _without_nulls(value: Any) -> Any:
    """A row as JSON would give it: what is null is not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_without_nulls(each) for each in value]
    return value


def _refuse(message: str) -> dict[str, Any]:
    raise ValueError(message)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
