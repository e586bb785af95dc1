"""The encoder of a run: fitted once, on rank 0, and read by all ranks from the run directory."""

from collections.abc import Sequence
from pathlib import Path

from llm_knowledge.errors import InputError
from trainer.config.run import DataConfig
from trainer.data.dataset import split_files
from trainer.distributed.process_group import Runtime, on_all_ranks
from trainer.features.encoder import FILE, FeatureEncoder
from trainer.features.fit import fit_encoder
from trainer.features.resolve import Feature


def run_encoder(
    features: Sequence[Feature],
    data: DataConfig,
    start_from: str | None,
    folder: Path,
    runtime: Runtime,
) -> FeatureEncoder:
    """Reads the run's encoder, which rank 0 fits on the training splits unless it is there.

    Args:
        features: What the model reads.
        data: Where the training splits are.
        start_from: The run, or checkpoint of one, that this one starts from.
        folder: The run directory.
        runtime: The job.

    Raises:
        InputError: The data cannot be encoded, or the encoder there is of other features.
    """
    if not features and not (folder / FILE).exists():
        return FeatureEncoder([])

    def fit() -> None:
        if runtime.is_main and not (folder / FILE).exists():
            encoder = fit_encoder(features, training_files(data), _earlier(start_from))
            try:
                encoder.save(folder)
            except OSError as error:
                raise InputError(f"{folder / FILE}: cannot be written: {error.strerror}") from error

    on_all_ranks(fit)
    encoder = FeatureEncoder.load(folder)
    encoder.check(features, folder)
    return encoder


def training_files(data: DataConfig) -> list[Path]:
    """Files of the splits that the run is trained on."""
    return [file for split in data.train_splits for file in split_files(data.path, split)]


def _earlier(start_from: str | None) -> FeatureEncoder | None:
    """Encoder of the run that this one starts from: its moments and boundaries are kept."""
    if start_from is None:
        return None
    source = Path(start_from)
    for folder in (source, source.parent.parent):  # a run, or one of its checkpoints
        if (folder / FILE).exists():
            return FeatureEncoder.load(folder)
    return None
