"""What a refresh costs against a full extraction, when the prompts of some users have changed.

    OMP_NUM_THREADS=1 python -m benchmarks.refresh --data data/food-kitchen --min-interactions 8

A store is extracted; the stored prompts of every hundredth user are altered, so that a refresh finds them
changed; then it is refreshed. Processor time of one thread, both with the model loaded anew, after all
packages have been imported.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.extraction import decoder
from embeddings.profiling.measure import machine
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.extraction.refresh import refresh
from llm_knowledge.store.reader import KnowledgeStore
from llm_knowledge.store.writer import write_store


def main() -> None:
    """Extracts, alters, refreshes; prints and writes the times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset")
    parser.add_argument("--model", choices=("decoder", "minilm"), default="decoder")
    parser.add_argument("--min-interactions", type=int, default=1)
    parser.add_argument("--every", type=int, default=100, help="one user in so many has changed")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """Seconds of processor time of the extraction and of the refresh."""
    model = {"model": str(decoder(scratch / "model"))} if options.model == "decoder" else {}
    config = ExtractConfig(
        data=options.data,
        out=scratch / "full",
        level="user",
        progress=False,
        min_interactions=options.min_interactions,
        **model,
    )
    began = time.process_time()
    extract(config)
    full = time.process_time() - began
    old = KnowledgeStore.open(scratch / "full")
    rows = old.manifest.rows
    text = old.read_text(np.arange(rows))
    prompts = [
        row["prompt"] + ("!" if n % options.every == 0 else "") for n, row in enumerate(text)
    ]
    cutoffs = [int(cutoff) for cutoff in old.cutoffs()]
    write_store(
        scratch / "old", old.manifest, old.keys(), old.read_vectors(0, rows), prompts, None, cutoffs
    )
    began = time.process_time()
    done = refresh(scratch / "old", options.data, scratch / "new", **model)
    seconds = time.process_time() - began
    return {
        "machine": machine(),
        "model": options.model,
        "users": rows,
        "changed": int(done.changed),
        "kept": int(done.kept),
        "full_seconds": round(full, 2),
        "refresh_seconds": round(seconds, 2),
        "share": round(seconds / full, 4),
        "share_changed": round(int(done.changed) / rows, 4),
    }


if __name__ == "__main__":
    main()
