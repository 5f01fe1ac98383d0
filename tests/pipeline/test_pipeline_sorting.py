"""The order of the selection index, of more rows than are held in memory."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from pipeline.sorting import in_groups, sorted_rows


def made_up(rows):
    random = np.random.default_rng(rows)
    return [
        {
            "clip_id": hashlib.sha256(str(i).encode()).hexdigest()[:16],
            "bucket": str(random.choice(["16x32x32", "16x32x320", "8x32x32"])),
            "caption": None if i % 7 == 0 else f"caption {i}",
        }
        for i in range(rows)
    ]


@pytest.mark.parametrize("at_once", [1, 50, 10_000])
def test_rows_come_in_order_however_few_are_held_at_once(at_once):
    rows = made_up(300)
    tables = [pa.Table.from_pylist(rows[i : i + 20]) for i in range(0, 300, 20)]
    found = [row for table in sorted_rows(tables, at_once) for row in table.to_pylist()]
    assert found == sorted(rows, key=lambda row: (row["bucket"], row["clip_id"]))


def test_no_rows_have_no_portions():
    assert list(sorted_rows([], 10)) == []
    assert list(sorted_rows([pa.Table.from_pylist(made_up(1)).slice(1)], 10)) == []


def test_groups_do_not_depend_on_how_the_rows_were_cut():
    whole = pa.Table.from_pylist(made_up(25))
    for step in (1, 4, 25):
        groups = list(in_groups((whole.slice(i, step) for i in range(0, 25, step)), 10))
        assert [group.num_rows for group in groups] == [10, 10, 5]
        assert pa.concat_tables(groups).to_pylist() == whole.to_pylist()
        assert all(group["clip_id"].num_chunks == 1 for group in groups)
