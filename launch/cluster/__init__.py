"""Many hosts: torchx components, schedulers, manifests."""
