"""The kinds of cases, and their shares of a run."""

import importlib
from dataclasses import dataclass

from tests.fuzz.folder_cases import dataset_case, run_case, store_case
from tests.fuzz.prepare_cases import prepare_case
from tests.fuzz.runner import Case
from tests.fuzz.settings_cases import config_case, job_case, words_case

# What commands import when they need it: here before the fork, so that every case finds it there.
for heavy in (
    "duckdb",
    "embeddings.cpu",
    "launch.cluster.submit",
    "llm_knowledge.store.compress",
    "llm_knowledge.store.inspect",
    "torch.utils.tensorboard",
    "trainer.data.sources.parquet_log",
    "trainer.evaluation.compare",
    "trainer.report.page",
    "trainer.training.loop",
    "trainer.training.scoring",
):
    importlib.import_module(heavy)


@dataclass(frozen=True)
class Kind:
    """A kind of cases: what is run, and how many of all cases it gets."""

    case: Case
    share: float


KINDS = {
    "prepare": Kind(prepare_case, 0.5),
    "store": Kind(store_case, 0.2),
    "words": Kind(words_case, 0.1),
    "job": Kind(job_case, 0.12),
    "config": Kind(config_case, 0.025),
    "dataset": Kind(dataset_case, 0.02),
    "run": Kind(run_case, 0.035),
}
