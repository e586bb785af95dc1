"""Offline knowledge: a frozen language model reads prompts, its hidden states are stored.

Modules: `profiles` (what the log says, by DuckDB), `prompts` (text), `encoder` (frozen model
to vectors), `extract` (the job), `store` (the result on disk), `inspect` (a look at it).
Nothing heavy is imported here; this package knows nothing of the trainer.
"""
