"""Users per second of the encoder against the loop that one writes first, trick by trick.

    python -m benchmarks.extraction --raw ../shared/data/ml-latest-small

The variants take turns over the same prompts; a figure is the median of the rounds.
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

import numpy as np

PLAIN_BATCH = 32
FOLDERS = ("data/ml-latest-small", "../shared/data/ml-latest-small")


def main() -> None:
    """Measure and print two Markdown tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--raw", type=Path, help="MovieLens folder; default: found, else simulated")
    parser.add_argument("--prompts", type=int, default=32, help="users per round, default: 32")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: all")
    parser.add_argument("--model", choices=("decoder", "minilm", "both"), default="both")
    options = parser.parse_args()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        data, name = dataset(options.raw, Path(scratch) / "data")
        print(f"{name}; {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
              f"{os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, torch "
              f"{torch.__version__}, transformers {transformers.__version__}; median of "
              f"{options.rounds} interleaved rounds of {options.prompts} users", flush=True)  # fmt: skip
        models = {"decoder": decoder(Path(scratch) / "decoder"), "minilm": None}
        for kind in models if options.model == "both" else (options.model,):
            table(kind, models[kind], data, options.prompts, options.rounds)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


def dataset(raw: Path | None, out: Path) -> tuple[Path, str]:
    """A prepared dataset: MovieLens where it lies, a simulated log otherwise."""
    found = raw or next((Path(folder) for folder in FOLDERS if Path(folder).is_dir()), None)
    if found:
        from trainer.data.movielens import prepare_movielens

        prepare_movielens(found, out)
        return out, "MovieLens latest-small"
    from trainer.data.simulate import simulate

    simulate(out, 600, 1000, 3, 60_000, seed=0)
    return out, "simulated log"


def decoder(path: Path) -> Path:
    """A random model of Qwen3's shape, 6 layers of 512, float32, with MiniLM's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from llm_knowledge.encoder import default_model_path

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=30_522, hidden_size=512, intermediate_size=1536,
                         num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
                         head_dim=64, max_position_embeddings=2048)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(path)
    return path


def prompts(data: Path, kind: str, count: int, encoder: object) -> list[str]:
    """User prompts as an extraction writes them, spread over the users."""
    from llm_knowledge.profiles import Dataset, ProfileOptions, profile_batches
    from llm_knowledge.prompts import Renderer, default_template, load_template

    about = Dataset.open(data)
    template = load_template(default_template("user", kind), "user")
    renderer = Renderer(template, about.scenarios, about.positive_name, about.negative_name,
                        encoder.count_tokens, encoder.max_tokens)  # type: ignore[attr-defined] # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        batches = profile_batches(about, "user", ProfileOptions(), 1024, Path(scratch))
        rows = [row for batch in batches for row in batch["data"].to_pylist()]
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return renderer.render(json.loads(rows[row]) for row in order)


def plain_loop(
    path: Path, kind: str, max_tokens: int, logits: bool
) -> Callable[[list[str]], np.ndarray]:
    """Batches of 32 in the order of the users, padded, with the defaults of transformers."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = (AutoModelForCausalLM if logits else AutoModel).from_pretrained(path).eval()

    @torch.no_grad()
    def encode(texts: list[str]) -> np.ndarray:
        out = []
        for at in range(0, len(texts), PLAIN_BATCH):
            batch = tokenizer(texts[at : at + PLAIN_BATCH], padding=True, truncation=True,
                              max_length=max_tokens, return_tensors="pt")  # fmt: skip
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


def table(name: str, path: Path | None, data: Path, count: int, rounds: int) -> None:
    """Print users/s of every variant, each with one trick more than the one above."""
    from llm_knowledge.encoder import Encoder

    sorted_float = Encoder(path, device="cpu", dtype="float32", prefix_reuse="off")
    sorted_bf16 = Encoder(path, device="cpu", dtype="bfloat16", prefix_reuse="off")
    kind, limit = sorted_float.kind, sorted_float.max_tokens
    texts = prompts(data, kind, count, sorted_float)
    plain = plain_loop(sorted_float.path, kind, limit, False)
    encoders = {"+ sorted by length, token-budget batches": sorted_float}
    variants: dict[str, Callable[[list[str]], np.ndarray]] = {}
    if kind == "decoder":
        variants["causal language model, with logits"] = plain_loop(
            sorted_float.path, kind, limit, True
        )
        reuse = Encoder(path, device="cpu", dtype="float32")
        encoders |= {"+ shared prefix computed once (float32)": reuse,
                     "+ bfloat16": Encoder(path, device="cpu", dtype="bfloat16")}  # fmt: skip
    else:
        encoders["+ bfloat16"] = sorted_bf16
    variants["plain loop, no logits"] = plain
    variants |= {label: encoder.encode for label, encoder in encoders.items()}
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    result = {}
    for encode in variants.values():
        encode(texts[:4])  # warm-up
    for _ in range(rounds):
        for label, encode in variants.items():
            begun = time.perf_counter()
            result[label] = encode(texts)
            seconds[label].append(time.perf_counter() - begun)
    tokens = sum(sorted_float.count_tokens(texts))
    print(f"\n{name}: {tokens / len(texts):.0f} tokens per prompt\n")
    print("| variant | users/s | over the plain loop | over the row above | worst cosine | largest "
          "difference |\n|---|---|---|---|---|---|")  # fmt: skip
    base, before = statistics.median(seconds["plain loop, no logits"]), 0.0
    exact = result["plain loop, no logits"]
    for label, taken in seconds.items():
        middle, found = statistics.median(taken), result[label]
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
        cosine = ((found * exact).sum(1) / norms).min()
        step = f"{before / middle:.2f}x" if before else "–"
        print(f"| {label} | {len(texts) / middle:.1f} | {base / middle:.2f}x | {step} | {cosine:.6f} | "
              f"{np.abs(found - exact).max():.1e} |", flush=True)  # fmt: skip
        before = middle
    for label, encoder in encoders.items():
        print(f"\n{label.removeprefix('+ ')}: {encoder.counters}", flush=True)


def processor() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
