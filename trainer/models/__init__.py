"""Backbones and the LLM4MSR wrapper around any of them."""

from torch import nn

from trainer.models.adaptdhm import AdaptDHM
from trainer.models.adasparse import AdaSparse
from trainer.models.aitm import AITM
from trainer.models.dcnv2 import DCNv2
from trainer.models.deepfm import DeepFM
from trainer.models.dnn import DNN
from trainer.models.epnet import EPNet
from trainer.models.hamur import HAMUR
from trainer.models.hinet import HiNet
from trainer.models.m2m import M2M
from trainer.models.m3oe import M3oE
from trainer.models.mmoe import MMoE
from trainer.models.pepnet import PEPNet
from trainer.models.ple import PLE
from trainer.models.ppnet import PPNet
from trainer.models.sarnet import SARNet
from trainer.models.shared_bottom import SharedBottom
from trainer.models.star import Star

# Name in configurations to class. All are made as (in_features, num_scenarios, hidden, dropout,
# num_tasks) and map the bottom input [B, in] and scenarios int64 [B] to logits [B, tasks].
BACKBONES: dict[str, type[nn.Module]] = {
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "star": Star,
    "aitm": AITM,
    "sar_net": SARNet,
    "m2m": M2M,
    "ada_sparse": AdaSparse,
    "adapt_dhm": AdaptDHM,
    "epnet": EPNet,
    "ppnet": PPNet,
    "pepnet": PEPNet,
    "hamur": HAMUR,
    "m3oe": M3oE,
    "hinet": HiNet,
    "dnn": DNN,
    "dcnv2": DCNv2,
    "deepfm": DeepFM,
}
