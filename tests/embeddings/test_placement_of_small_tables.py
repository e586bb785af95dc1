"""Tables whose rows do not reach all ranks are not cut by rows: kernels fail on a rank without any."""

import pytest

from embeddings.placement import Placement, wanted_placement
from embeddings.tables import Table


@pytest.mark.parametrize(
    ("rows", "ranks", "kind"),
    [
        (3, 4, "table_wise"),
        (6, 4, "table_wise"),  # 2, 2, 2 and none
        (9, 4, "table_wise"),  # 3, 3, 3 and none
        (4, 4, "row_wise"),
        (10, 4, "row_wise"),
        (34, 4, "row_wise"),
        (1, 1, "row_wise"),
    ],
)
def test_a_table_is_cut_by_rows_where_every_rank_gets_some(
    rows: int, ranks: int, kind: str
) -> None:
    table = Table("city", rows, 4, ("city",), sequence=True)
    assert wanted_placement(table, {}, ranks).sharding == kind
    given = {"city": Placement(sharding="column_wise")}
    assert wanted_placement(table, given, ranks).sharding == "column_wise"
