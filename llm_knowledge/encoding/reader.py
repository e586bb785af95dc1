"""One batch of token ids through a frozen model: packed or padded, then pooled.

Shape legend: B texts, T tokens, P tokens of a shared prefix, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from llm_knowledge.encoding.prefix import compute_prefix, supports_sharing
from llm_knowledge.encoding.rotations import GrowingRotations, length_rule
from llm_knowledge.encoding.tokens import pad
from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    from llm_knowledge.encoding.answers import Answers
    from llm_knowledge.encoding.packed import Packing
    from llm_knowledge.encoding.prefix import SharedPrefix

# A model that a way of reading does not suit may raise any of these.
SHAPE_ERRORS = (
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
)


class Reader:
    """A model, which hidden state of it is wanted, and how one vector becomes of it.

    Attributes:
        model: without a language-model head.
        causal: whether a token sees no later one.
        pooling: "mean" over the tokens, "last" token or "cls", the first.
        layer, normalize: see `Encoder`.
        lengths: which texts may share a batch and a prefix.
        packing: how packed batches are read; None where batches are padded.
        shares: whether keys and values of a common prefix can be put in front of a batch.
        dim: length of a vector; that of the final states may be another than the configuration's.
    """

    def __init__(
        self, model: Any, causal: bool, pooling: str, layer: int, normalize: bool, attention: str
    ) -> None:
        """Chooses between packed and padded batches.

        Raises:
            InputError: the model cannot read a text, or packed batches are asked for, and it
                cannot read them.
        """
        self.model, self.causal, self.pooling, self.layer = model, causal, pooling, layer
        self.normalize = normalize
        self.lengths, self._growing = length_rule(model.config), GrowingRotations(model)
        self.shares = causal and supports_sharing(model)
        self.packing: Packing | None = None
        self.dim = self._measure_dim()
        on_cpu = model.device.type == "cpu"
        if attention == "packed" or (attention == "auto" and on_cpu):
            from llm_knowledge.encoding.packed import Packing, supports_packing

            if supports_packing(model, causal):
                self.packing = Packing(model)
            elif attention == "packed":
                raise InputError(
                    "--attention packed: this model has an attention of its own; use auto"
                )

    def _measure_dim(self) -> int:
        try:
            return self.read([[0, 0]]).shape[1]
        except SHAPE_ERRORS as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"a model of type {self.model.config.model_type!r} cannot read a text ({lines[0]}); "
                f"use an encoder or a decoder"
            ) from error

    def positions(self, ids: list[list[int]], prefix: SharedPrefix | None) -> int:
        """Positions that `read` computes for a batch, padding included."""
        shared = len(prefix.tokens) if prefix else 0
        if self.packing is not None:
            return sum(map(len, ids)) - shared * len(ids)
        return len(ids) * (max(map(len, ids)) - shared)

    def prefix(self, tokens: list[int]) -> SharedPrefix | None:
        """The states of tokens that texts begin with; None if the model cannot share them."""
        self._growing.reset()
        return compute_prefix(self.model, tokens, self.layer)

    def read(self, ids: list[list[int]], prefix: SharedPrefix | None = None) -> torch.Tensor:
        """Vectors of one batch of texts that begin with `prefix`, if given: float32 [B, D]."""
        self._growing.reset()
        with torch.inference_mode():
            pool = self._packed if self.packing is not None else self._padded
            pooled_BD = pool(ids, prefix)
            return self._scaled(pooled_BD)

    def _scaled(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        return normalize(pooled_BD, dim=1) if self.normalize else pooled_BD

    def answer(
        self, answers: Answers, ids: list[list[int]], prefix: SharedPrefix | None, path: bool
    ) -> tuple[torch.Tensor, list[str]]:
        """As `read`, padded, and an answer to each text.

        The vectors are those of `read`, or, with `path`, of the last step of the generation.
        """
        self._growing.reset()
        with torch.inference_mode():
            hidden_BTD, mask_BT, state_BD, said = answers.generate(ids, prefix, self.layer)
            pooled_BD = state_BD if path else self._pool(hidden_BTD, mask_BT, prefix)
            return self._scaled(pooled_BD), said

    def goes_on(self, answers: Answers, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Answers.second_states`."""
        self._growing.reset()
        with torch.inference_mode():
            return answers.second_states(ids)

    def _packed(self, ids: list[list[int]], prefix: SharedPrefix | None) -> torch.Tensor:
        assert self.packing is not None
        end = {"last": -1, "cls": 0}.get(self.pooling)
        hidden = self.packing.hidden(ids, prefix, self.layer, end).float()
        if end is not None:
            return hidden
        shared = len(prefix.tokens) if prefix else 0
        texts = hidden.split([len(text_ids) - shared for text_ids in ids])
        sum_BD = torch.stack([text_TD.sum(0) for text_TD in texts])
        return self._mean(sum_BD, torch.tensor([len(text_ids) for text_ids in ids]), prefix)

    def _padded(self, ids: list[list[int]], prefix: SharedPrefix | None) -> torch.Tensor:
        device, shared = self.model.device, len(prefix.tokens) if prefix else 0
        ids_BT, mask_BT = pad([text_ids[shared:] for text_ids in ids])
        mask_BT = mask_BT.to(device)
        context: dict[str, Any] = {"attention_mask": mask_BT.long()}
        if prefix:
            ones_BP = mask_BT.new_ones((len(ids), shared), dtype=torch.long)
            place_1T = torch.arange(shared, shared + ids_BT.shape[1], device=device)[None]
            context = {
                "attention_mask": torch.cat([ones_BP, mask_BT.long()], dim=1),
                "position_ids": place_1T.expand(len(ids), -1),
                "use_cache": True,
                "past_key_values": prefix.cache(len(ids)),
            }
        output = self.model(
            input_ids=ids_BT.to(device), output_hidden_states=self.layer != -1, **context
        )
        hidden_BTD = output.last_hidden_state
        if self.layer != -1:
            hidden_BTD = output.hidden_states[self.layer]
        hidden_BTD = hidden_BTD.to(device)  # a divided model ends on another one
        return self._pool(hidden_BTD, mask_BT, prefix)

    def _pool(
        self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, prefix: SharedPrefix | None
    ) -> torch.Tensor:
        """Mean over the tokens, those of the prefix included, or one of them: float32 [B, D]."""
        count_B = mask_BT.sum(1)
        if self.pooling == "cls":
            return hidden_BTD[:, 0].float()
        if self.pooling == "last":
            rows_B = torch.arange(len(count_B), device=count_B.device)
            return hidden_BTD[rows_B, count_B - 1].float()
        sum_BD = (hidden_BTD.float() * mask_BT[..., None]).sum(1)
        return self._mean(sum_BD, count_B + (len(prefix.tokens) if prefix else 0), prefix)

    def _mean(
        self, sum_BD: torch.Tensor, count_B: torch.Tensor, prefix: SharedPrefix | None
    ) -> torch.Tensor:
        if prefix is not None:
            sum_BD = sum_BD + prefix.hidden_PD.sum(0)
        return sum_BD / count_B.to(sum_BD.device)[:, None]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on an accelerator or not."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message
