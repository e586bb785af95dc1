"""What an encoder has done so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What an encoder has done so far.

    Attributes:
        texts: number of texts.
        tokens: their tokens.
        reused: those of them whose states came from a shared prefix.
        computed: positions that went through the model, padding included.
        padding: positions that held no token.
        seconds: time in the model.
    """

    texts: int = 0
    tokens: int = 0
    reused: int = 0
    computed: int = 0
    padding: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        padding, reused = self.padding / max(1, self.computed), self.reused / max(1, self.tokens)
        return f"{rate:,.0f} tokens/s, padding {padding:.0%}, reused {reused:.0%}"
