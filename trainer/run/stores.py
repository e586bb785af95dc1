"""Stores of knowledge, opened for a run and checked against its dataset."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm_knowledge.dataset_files import dataset_origin
from llm_knowledge.errors import InputError
from llm_knowledge.store.dated import DatedStores
from trainer.config.run import DataConfig, KnowledgeConfig
from trainer.data.dataset import DatasetInfo, split_files
from trainer.data.loading.row_groups import RowGroups

logger = logging.getLogger(__name__)
COVERAGE_ROWS = 100_000  # training rows that are looked at
LOW_COVERAGE = 0.1  # share of them with a vector below which a warning is due


def open_stores(knowledge: KnowledgeConfig, dataset: DatasetInfo) -> dict[str, DatedStores]:
    """Opens the configured stores and checks that they can be joined with the dataset.

    Raises:
        InputError: If a store is of another level or its keys are of another type, or dated stores do
            not belong together.
    """
    stores: dict[str, DatedStores] = {}
    key_types = {
        "user": dataset.user_id_type,
        "item": dataset.item_id_type,
        "scenario": dataset.scenario_id_type,
    }
    for level, key_type in key_types.items():
        path = getattr(knowledge, level)
        if path is None:
            continue
        stores[level] = DatedStores.open(path)
        for store in stores[level].stores:
            if store.manifest.level != level:
                raise InputError(
                    f"knowledge.{level}: {store.path} is a store of level {store.manifest.level}"
                )
            if store.manifest.key_type != key_type:
                raise InputError(
                    f"knowledge.{level}: {store.path} has {store.manifest.key_type} keys, the dataset's "
                    f"{level} ids are {key_type}"
                )
            store.keys()  # reads and checks them
    return stores


def check_origin(
    stores: dict[str, DatedStores], data: str, other_dataset: bool, is_main: bool
) -> None:
    """Checks that stores were made from this dataset, or from one that it was appended to.

    Integer ids of two logs overlap without meaning the same, and vectors of another log may have read
    events that are later here.

    Raises:
        InputError: One was made from another dataset, and the configuration does not ask for it.
    """
    origin = dataset_origin(data)
    for level, dated in stores.items():
        for store in dated.stores:
            made_from = store.manifest.dataset
            if made_from is None and is_main:
                logger.warning(
                    "knowledge.%s: %s does not say which dataset it was made from, so this was not checked; "
                    "a refresh says it",
                    level,
                    store.path,
                )
            elif made_from not in (None, origin) and not other_dataset:
                raise InputError(
                    f"knowledge.{level}: {store.path} was made from another dataset than {data} "
                    f"({made_from}, not {origin}); extract from this one, or set "
                    "knowledge.other_dataset: true if ids mean the same in both"
                )


def check_coverage(stores: dict[str, DatedStores], data: DataConfig, is_main: bool) -> None:
    """Checks that stores have vectors for keys of the training rows, looking at the first of them.

    Raises:
        InputError: For none of them.
    """
    columns = {level: f"{level}_id" for level in stores}
    if not columns:
        return
    rows = _first_rows(data, list(columns.values()))
    for level, column in columns.items():
        keys = rows.column(column).combine_chunks().unique()
        typed = keys.to_pylist() if pa.types.is_string(keys.type) else keys.to_numpy()
        known = np.zeros(len(keys), dtype=bool)
        for store in stores[level].stores:
            known |= store.row_of(typed) >= 0
        present = pc.is_in(rows.column(column), value_set=keys.filter(pa.array(known)))
        share = pc.mean(present).as_py()
        if not known.any() and len(keys):
            example = stores[level].stores[0].keys()[:1].tolist()
            raise InputError(
                f"knowledge.{level}: {stores[level].stores[0].path} has no vector for any of the "
                f"{len(keys):,} {level}s in the first {len(rows):,} training rows of {data.path}: its keys "
                f"are like {example}, the dataset's like {keys[:1].to_pylist()}; extract from this dataset"
            )
        if share < LOW_COVERAGE and is_main:
            logger.warning(
                "knowledge.%s: %.1f %% of the first %s training rows have a vector; is it the right store?",
                level,
                100 * share,
                f"{len(rows):,}",
            )


def _first_rows(data: DataConfig, columns: list[str]) -> pa.Table:
    """These columns of the first training rows, a few row groups at most."""
    parts = [part for split in data.train_splits for part in split_files(data.path, split)]
    groups = RowGroups(parts)
    tables: list[pa.Table] = []
    for group in range(len(groups)):
        if sum(map(len, tables)) >= COVERAGE_ROWS:
            break
        tables.append(groups.read(columns, group)[0])
    return pa.concat_tables(tables).slice(0, COVERAGE_ROWS)
