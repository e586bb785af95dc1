"""Users per second of the encoder against the loop that one writes first, trick by trick.

    python -m benchmarks.extraction --raw data/ml-latest-small --out benchmarks/results/extraction.json

The variants take turns over the same prompts, in another order each round. A gain is the median over
the rounds of two variants' times in the same round. Beside the time on the clock stands the time of
the process on the processor, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PLAIN, PLAIN_BATCH = "plain loop, no logits", 32
FOLDERS = ("data/ml-latest-small", "../shared/data/ml-latest-small")
Encode = Callable[[list[str]], np.ndarray]


def main() -> None:
    """Measure, print Markdown tables, and write them with every round to a JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--raw", type=Path, help="MovieLens folder; default: found, else simulated")
    parser.add_argument("--prompts", type=int, default=256, help="users per round, default: 256")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: all")
    parser.add_argument("--model", choices=("decoder", "minilm", "both"), default="both")
    parser.add_argument("--out", type=Path, help="JSON file for the figures of every round")
    options = parser.parse_args()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        data, name = dataset(options.raw, Path(scratch) / "data")
        about = {
            "data": name,
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_at_start": os.getloadavg()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "prompts": options.prompts,
            "rounds": options.rounds,
        }
        print("; ".join(f"{key} {value}" for key, value in about.items()), flush=True)
        models = {"decoder": decoder(Path(scratch) / "decoder"), "minilm": None}
        found: dict[str, Any] = {"about": about}
        for kind in models if options.model == "both" else (options.model,):
            found[kind] = measure(kind, models[kind], data, options.prompts, options.rounds)
    about["load_at_end"] = os.getloadavg()[0]
    print(f"\nload {about['load_at_end']:.1f} at the end")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def dataset(raw: Path | None, out: Path) -> tuple[Path, str]:
    """A prepared dataset: MovieLens where it lies, a simulated log otherwise."""
    found = raw or next((Path(folder) for folder in FOLDERS if Path(folder).is_dir()), None)
    if found:
        from trainer.data.sources.movielens import prepare_movielens

        prepare_movielens(found, out)
        return out, "MovieLens latest-small"
    from trainer.data.sources.simulate import simulate

    simulate(out, 600, 1000, 3, 60_000, seed=0)
    return out, "simulated log"


def decoder(path: Path) -> Path:
    """A random model of Qwen3's shape, 6 layers of 512, float32, with MiniLM's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from llm_knowledge.encoding.encoder import default_model_path

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=30_522,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(path)
    return path


def prompts(data: Path, kind: str, count: int, encoder: object) -> list[str]:
    """User prompts as an extraction writes them, spread over the users."""
    from llm_knowledge.profiles.dataset import Dataset, ProfileOptions, profile_batches
    from llm_knowledge.prompts import Renderer, default_template, load_template

    about = Dataset.open(data)
    template = load_template(default_template("user", kind), "user")
    renderer = Renderer(
        template,
        about.scenarios,
        about.positive_name,
        about.negative_name,
        encoder.count_tokens,
        encoder.max_tokens,
    )  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as scratch:
        batches = profile_batches(about, "user", ProfileOptions(), 1024, Path(scratch))
        rows = [row for batch in batches for row in batch["data"].to_pylist()]
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return renderer.render(json.loads(rows[row]) for row in order)


def plain_loop(path: Path, kind: str, max_tokens: int, logits: bool) -> Encode:
    """Batches of 32 in the order of the users, padded to the longest, with transformers' defaults.

    With ``logits``, the model is the causal language model with all hidden states kept, which is
    what a first version does; without, the model has no head.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = (AutoModelForCausalLM if logits else AutoModel).from_pretrained(path).eval()

    @torch.no_grad()
    def encode(texts: list[str]) -> np.ndarray:
        out = []
        for at in range(0, len(texts), PLAIN_BATCH):
            batch = tokenizer(
                texts[at : at + PLAIN_BATCH],
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
            batch.pop("token_type_ids", None) if kind == "decoder" else None
            said = model(**batch, output_hidden_states=logits)
            hidden = said.hidden_states[-1] if logits else said.last_hidden_state
            mask = batch["attention_mask"]
            if kind == "decoder":
                pooled = hidden[torch.arange(len(mask)), mask.sum(1) - 1]
            else:
                pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                pooled = torch.nn.functional.normalize(pooled, dim=1)
            out.append(pooled.float().numpy())
        return np.concatenate(out)

    return encode


def variants(path: Path | None) -> tuple[dict[str, Encode], Any]:
    """What is compared, each variant with one trick more than the one before; and an encoder."""
    from llm_knowledge.encoding.encoder import Encoder

    def encoder(attention: str, reuse: str, prunes: bool, dtype: str) -> Any:
        made = Encoder(
            path,
            device="cpu",
            attention=attention,
            prefix_reuse=reuse,  # type: ignore[arg-type]
            dtype=dtype,
        )  # type: ignore[arg-type]
        if made._reader.packing is not None:
            made._reader.packing.prunes &= prunes
        return made

    by_length = encoder("sdpa", "off", False, "float32")
    made: dict[str, Any] = {
        "+ sorted by length, batches of 2048 tokens": by_length,
        "+ packed: no padding": encoder("auto", "off", False, "float32"),
    }
    kind, limit = by_length.kind, by_length.max_tokens
    loops: dict[str, Encode] = {}
    if kind == "decoder":
        loops["causal language model, with logits"] = plain_loop(by_length.path, kind, limit, True)
        made["+ shared prefix computed once"] = encoder("auto", "auto", False, "float32")
        made["+ last layer for last tokens only"] = encoder("auto", "auto", True, "float32")
    made["+ bfloat16"] = encoder("auto", "auto", True, "bfloat16")
    loops[PLAIN] = plain_loop(by_length.path, kind, limit, False)
    return loops | {label: one.encode for label, one in made.items()}, by_length


def measure(name: str, path: Path | None, data: Path, count: int, rounds: int) -> dict[str, Any]:
    """Time all variants and print their table; returns the figures of every round."""
    arms, encoder = variants(path)
    texts = prompts(data, encoder.kind, count, encoder)
    tokens = encoder.count_tokens(texts)
    taken: dict[str, list[tuple[float, float]]] = {label: [] for label in arms}
    vectors = {}
    for encode in arms.values():
        encode(texts[:8])  # warm-up; packing and prefix reuse are tried out once
    for number in range(rounds):
        turn = number % len(arms)
        for label in [*list(arms)[turn:], *list(arms)[:turn]]:
            begun = time.perf_counter(), time.process_time()
            vectors[label] = arms[label](texts)
            taken[label].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
        print(
            f"round {number + 1}: " + ", ".join(f"{own[-1][1]:.1f}" for own in taken.values()),
            "s of processor time",
            flush=True,
        )
    batches = [tokens[at : at + PLAIN_BATCH] for at in range(0, len(tokens), PLAIN_BATCH)]
    plain = sum(max(batch) * len(batch) for batch in batches)
    print(
        f"\n{name}: {np.mean(tokens):.0f} tokens per prompt; the plain loop computes "
        f"{plain / len(texts):.0f} positions per prompt\n"
    )
    print(
        "| variant | users/s | over the plain loop | on the processor | over the row above, on the "
        "processor | worst cosine | largest difference |\n|---|---|---|---|---|---|---|"
    )
    before = ""
    for label, own in taken.items():
        cells = [
            gain(taken[PLAIN], own, 0),
            gain(taken[PLAIN], own, 1),
            gain(taken[before], own, 1) if before else "–",
        ]
        rate = len(texts) / statistics.median(clock for clock, _ in own)
        cosine, difference = compare(vectors[label], vectors[PLAIN])
        print(
            f"| {label} | {rate:.1f} | {' | '.join(cells)} | {cosine:.6f} | {difference:.1e} |",
            flush=True,
        )
        before = label
    return {
        "tokens": int(sum(tokens)),
        "plain_positions": plain,
        "seconds": taken,
        "accuracy": {label: compare(found, vectors[PLAIN]) for label, found in vectors.items()},
    }


def gain(base: list[tuple[float, float]], own: list[tuple[float, float]], which: int) -> str:
    """Median and quartiles of the ratio of two variants' times (0: clock, 1: processor)."""
    ratios = [one[which] / two[which] for one, two in zip(base, own, strict=True)]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def compare(found: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Smallest cosine and largest difference of two sets of vectors [N, D]."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
    return float(((found * exact).sum(1) / norms).min()), float(np.abs(found - exact).max())


def processor() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
