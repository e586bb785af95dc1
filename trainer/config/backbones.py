"""The backbones that there are: name in configurations to module of `trainer.models` and class in it.

This is the one place where a backbone is registered. `trainer.models.BACKBONES` imports the classes; here
they are names, so that a configuration is checked without importing torch.
"""

BACKBONE_CLASSES = {
    "shared_bottom": "shared_bottom.SharedBottom",
    "mmoe": "mmoe.MMoE",
    "ple": "ple.PLE",
    "star": "star.Star",
    "aitm": "aitm.AITM",
    "sar_net": "sarnet.SARNet",
    "m2m": "m2m.M2M",
    "ada_sparse": "adasparse.AdaSparse",
    "adapt_dhm": "adaptdhm.AdaptDHM",
    "epnet": "epnet.EPNet",
    "ppnet": "ppnet.PPNet",
    "pepnet": "pepnet.PEPNet",
    "hamur": "hamur.HAMUR",
    "m3oe": "m3oe.M3oE",
    "hinet": "hinet.HiNet",
    "dnn": "dnn.DNN",
    "dcnv2": "dcnv2.DCNv2",
    "deepfm": "deepfm.DeepFM",
}
