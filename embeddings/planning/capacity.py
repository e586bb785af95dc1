"""What is short when tables do not fit, by how much, and what would make them fit."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from embeddings.placement import Placement
from embeddings.planning.memory import STATE_BYTES, deficit, limits, plan_memory
from embeddings.planning.traffic import BY_HOST
from embeddings.sharding import MINIMUM_COLUMNS, Hardware, Piece, TablePlan
from embeddings.tables import Table


def needed_and_available(
    tables: list[Table], placements: Mapping[str, Placement], optimizer: str, hardware: Hardware
) -> tuple[float, float]:
    """Bytes of rows and optimizer state in the devices' memory, and what all ranks have for them.

    What no plan can undercut: samples are left out.
    """
    plans = greedy_placement(tables, placements, hardware, "row_wise")
    memory = plan_memory(tables, plans, placements, optimizer, 0, hardware.ranks)
    return float(memory.device.sum()), limits(hardware)[0] * hardware.ranks


def greedy_placement(
    tables: Iterable[Table],
    placements: Mapping[str, Placement],
    hardware: Hardware,
    free: Literal["row_wise", "whole"],
) -> list[TablePlan]:
    """Places tables by their bytes alone, the largest first, each on the emptiest rank or host.

    An answer within a second where a search takes minutes: good enough to tell what cannot fit.

    Args:
        tables: All tables.
        placements: By table; those that are not named are row-wise.
        hardware: The cluster.
        free: How tables are taken that are left to the planner. row_wise spreads rows best, but every
            rank then holds vectors for the samples of all; whole puts a table on one rank where it
            takes little of it, on one host where it does not.
    """
    ranks, local = hardware.ranks, hardware.ranks_per_host
    load = np.zeros(ranks)
    plans = []
    for table in sorted(tables, key=lambda table: -table.rows * table.dim * table.bytes_per_value):
        kind = placements.get(table.name, Placement()).sharding
        if kind == "planner":
            kind = _whole(table, hardware) if free == "whole" else "row_wise"
        pieces: list[Piece] = []
        for column, columns in _columns(table, kind, hardware):
            if kind == "row_wise":
                pieces += _rows(table, range(ranks), column, columns)
            elif kind in BY_HOST:
                host = int(load.reshape(-1, local).sum(1).argmin())
                pieces += _rows(table, range(host * local, host * local + local), column, columns)
            elif kind == "data_parallel":
                pieces += [Piece(rank, 0, 0, table.rows, table.dim) for rank in range(ranks)]
            else:
                pieces.append(Piece(int(load.argmin()), 0, column, table.rows, columns))
            for piece in pieces[-1:] if kind in ("table_wise", "column_wise") else []:
                load[piece.rank] += piece.rows * piece.columns * table.bytes_per_value
            if kind in BY_HOST:
                load[host * local : host * local + local] += (
                    table.rows * columns * table.bytes_per_value / local
                )
        sizes = [0] * ranks
        for piece in pieces:
            sizes[piece.rank] += piece.rows * piece.columns * table.bytes_per_value
        plans.append(TablePlan(table.name, kind, "", table.rows, table.dim, sizes, pieces))
    return plans


def _whole(table: Table, hardware: Hardware) -> str:
    share = table.rows * table.dim * table.bytes_per_value / max(limits(hardware)[0], 1)
    if share <= 0.25:
        return "table_wise"
    return "row_wise" if table.sequence or share > hardware.ranks_per_host / 2 else "table_row_wise"


def _columns(table: Table, kind: str, hardware: Hardware) -> list[tuple[int, int]]:
    """(first column, columns) of the parts that a table is cut into."""
    if kind not in ("column_wise", "grid_shard"):
        return [(0, table.dim)]
    width = max(table.dim // hardware.ranks // MINIMUM_COLUMNS, 1) * MINIMUM_COLUMNS
    return [(start, min(width, table.dim - start)) for start in range(0, table.dim, width)]


def _rows(table: Table, ranks: range, column: int, columns: int) -> list[Piece]:
    block = -(-table.rows // len(ranks))
    return [
        Piece(rank, start, column, max(min(block, table.rows - start), 0), columns)
        for rank, start in zip(ranks, range(0, block * len(ranks), block), strict=True)
    ]


def least_deficit(
    tables: list[Table],
    placements: Mapping[str, Placement],
    optimizer: str,
    batch: int,
    hardware: Hardware,
) -> float:
    """Bytes that the worst rank lacks when tables are placed by the better `greedy_placement`."""
    deficits = []
    styles: tuple[Literal["row_wise", "whole"], ...] = ("row_wise", "whole")
    for free in styles:
        plans = greedy_placement(tables, placements, hardware, free)
        memory = plan_memory(tables, plans, placements, optimizer, batch, hardware.ranks)
        deficits.append(deficit(memory, hardware))
    return min(deficits)


def suggestions(
    tables: list[Table],
    placements: Mapping[str, Placement],
    optimizer: str,
    batch: int,
    hardware: Hardware,
) -> list[tuple[str, float]]:
    """What to change so that everything fits: (words, bytes the worst rank still lacks), best first."""
    tried: list[tuple[str, float]] = []
    packed = [
        table.name
        for table in tables
        if placements.get(table.name, Placement()).sharding not in ("row_wise", "planner")
    ]
    if packed:
        spread = dict(placements) | {
            name: replace(placements[name], sharding="row_wise") for name in packed
        }
        missing = least_deficit(tables, spread, optimizer, batch, hardware)
        tried.append((f"row_wise for {_names(packed)}", missing))
    if any(table.bytes_per_value > 2 and not table.frozen for table in tables):
        halved = [replace(table, bytes_per_value=2) for table in tables]
        missing = least_deficit(halved, placements, optimizer, batch, hardware)
        tried.append(("float16 rows for all tables", missing))
    if STATE_BYTES[optimizer][0]:
        missing = least_deficit(tables, placements, "rowwise_adagrad", batch, hardware)
        tried.append(("optimizer rowwise_adagrad", missing))
    if batch > 1:
        missing = least_deficit(tables, placements, optimizer, batch // 2, hardware)
        tried.append((f"{batch // 2:,} samples per rank instead of {batch:,}", missing))
    if hardware.device == "cuda":
        tried.append(_on_the_host(tables, placements, optimizer, batch, hardware))
    hosts = enough_hosts(tables, placements, optimizer, batch, hardware)
    if hosts is not None:
        more = replace(hardware, hosts=hosts)
        missing = least_deficit(tables, placements, optimizer, batch, more)
        tried.append((f"{more.ranks} ranks ({hosts} hosts) instead of {hardware.ranks}", missing))
    return sorted(tried, key=lambda suggestion: max(suggestion[1], 0))


def _on_the_host(
    tables: list[Table],
    placements: Mapping[str, Placement],
    optimizer: str,
    batch: int,
    hardware: Hardware,
) -> tuple[str, float]:
    """The fewest of the largest tables whose move to the host's memory makes room, or all of them."""
    largest = sorted(tables, key=lambda table: -table.rows * table.dim * table.bytes_per_value)
    moved = dict(placements)
    missing = 0.0
    for count in sorted({1, 2, 4, len(tables) // 4, len(tables) // 2, len(tables)} - {0}):
        for table in largest[:count]:
            old = placements.get(table.name, Placement())
            kind = "row_wise" if old.sharding == "data_parallel" else old.sharding
            moved[table.name] = replace(old, sharding=kind, kernel="uvm")
        missing = least_deficit(tables, moved, optimizer, batch, hardware)
        if missing <= 0 or count >= len(tables):
            break
    names = _names([table.name for table in largest[:count]])
    return f"kernel uvm (rows in the host's memory) for {names}", missing


def enough_hosts(
    tables: list[Table],
    placements: Mapping[str, Placement],
    optimizer: str,
    batch: int,
    hardware: Hardware,
    most_ranks: int = 4096,
) -> int | None:
    """The least number of hosts on which `greedy_placement` fits everything; None: more do not help."""
    too_few, hosts = hardware.hosts, hardware.hosts * 2
    while least_deficit(tables, placements, optimizer, batch, replace(hardware, hosts=hosts)) > 0:
        too_few, hosts = hosts, hosts * 2
        if hosts * hardware.ranks_per_host > most_ranks:
            return None
    while hosts - too_few > 1:
        middle = (hosts + too_few) // 2
        if least_deficit(tables, placements, optimizer, batch, replace(hardware, hosts=middle)) > 0:
            too_few = middle
        else:
            hosts = middle
    return hosts


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return (
        f"table {shown}"
        if len(names) == 1
        else (f"tables {shown}" if len(names) <= 3 else f"{len(names)} tables ({shown}, …)")
    )
