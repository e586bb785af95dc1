"""Which frozen model reads texts, how, and how its hidden states become one vector per text."""

from __future__ import annotations

from typing import Literal

from llm_knowledge.options import Options, option

Pooling = Literal["auto", "mean", "paragraphs", "last", "cls"]
Attention = Literal["auto", "packed", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
Compilation = Literal["off", "default", "reduce-overhead", "max-autotune"]


class EncoderOptions(Options):
    """The options of an `Encoder`, on a command line too; those that are None take the model's default."""

    model: str | None = option(
        None, "directory or hub name (safetensors only); default: the MiniLM package"
    )
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = option(False, "run Python code that a model brings")
    pooling: Pooling = option(
        "auto",
        "auto: paragraphs (each read on its own, then their mean) for encoders, last token for decoders, or "
        "what a sentence-transformers directory says; cls: first token",
    )
    layer: int = option(
        -1, "hidden state to take, default -1: the final one, the only one behind the final norm"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the model; auto: float32 on a CPU, bfloat16 elsewhere"
    )
    normalize: bool | None = option(
        None, "scale vectors to length 1; default: for encoders, or as the model's directory says"
    )
    max_tokens: int | None = option(
        None, "budget of a prompt; default: 256 encoder, 1024 decoder", gt=0
    )
    device: str | None = option(
        None,
        "cpu, cuda, cuda:0, ..., or all: a model larger than one accelerator is divided over all (needs "
        "accelerate, not measured); default: an accelerator if there is one",
    )
    batch_tokens: int | None = option(
        None, "computed tokens in a batch; default: 2048 CPU, 65536 GPU", gt=0
    )
    chat_template: Literal["auto", "off"] = option(
        "auto", "auto: a prompt is one user message, for decoders that bring a template"
    )
    prefix_reuse: Literal["auto", "off"] = option(
        "auto", "auto: compute what all prompts begin with once, for decoders"
    )
    backend: Literal["transformers", "vllm"] = option(
        "transformers",
        "what runs the model; vllm is a package of its own; default: transformers",
    )
    answer_tokens: int = option(
        0, "most tokens of an answer to store beside the vector; default: 0, none", ge=0
    )
    state: Literal["prompt", "answer"] = option(
        "prompt", "the vector is of the prompt, or of the last step of the generation"
    )
    attention: Attention = option("auto", "auto: packed (no padding) on a CPU, sdpa elsewhere")
    compilation: Compilation = option(
        "off",
        "mode of torch.compile; reduce-overhead takes CUDA graphs; default: off",
        name="--compile",
    )
