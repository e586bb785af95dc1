"""torchx components, one per stage: `torchx run llm4msr.train -j 2x8 -- --config run.yaml`.

torchx takes every function of this module for a component, hence nothing else is defined here.
"""

# torchx reads these signatures as source text and knows no newer spelling of the types.
from typing import Optional

import torchx.specs as specs

import launch.cluster.app as app


def extract(
    *arguments: str,
    j: Optional[str] = None,
    h: Optional[str] = None,
    image: Optional[str] = None,
    job: Optional[str] = None,
) -> specs.AppDef:
    """Extracts knowledge: `torchx run llm4msr.extract -j 2x8 -- --data DATA --level all --out STORES`.

    Args:
        arguments: arguments of `llm4msr knowledge extract`
        j: hosts x processes per host, [min:]max x processes when elastic
        h: named resource of a host
        image: container image
        job: job file; the flags override it
    """
    return app.component("extract", arguments, job, hosts=j, resource=h, image=image)


def train(
    *arguments: str,
    j: Optional[str] = None,
    h: Optional[str] = None,
    image: Optional[str] = None,
    job: Optional[str] = None,
) -> specs.AppDef:
    """Trains a run, or continues it: `torchx run llm4msr.train -j 2x8 -- --config run.yaml`.

    Args:
        arguments: arguments of `llm4msr train`
        j: hosts x processes per host, [min:]max x processes when elastic
        h: named resource of a host
        image: container image
        job: job file; the flags override it
    """
    return app.component("train", arguments, job, hosts=j, resource=h, image=image)


def evaluate(
    *arguments: str,
    j: Optional[str] = None,
    h: Optional[str] = None,
    image: Optional[str] = None,
    job: Optional[str] = None,
) -> specs.AppDef:
    """Scores a split and measures it: `torchx run llm4msr.evaluate -j 1x8 -- runs/star`.

    Args:
        arguments: arguments of `llm4msr evaluate`
        j: hosts x processes per host, [min:]max x processes when elastic
        h: named resource of a host
        image: container image
        job: job file; the flags override it
    """
    return app.component("evaluate", arguments, job, hosts=j, resource=h, image=image)


def profile(
    *arguments: str,
    j: Optional[str] = None,
    h: Optional[str] = None,
    image: Optional[str] = None,
    job: Optional[str] = None,
) -> specs.AppDef:
    """Profiles: `torchx run llm4msr.profile -j 1x1 -- meta-layer --batch 4096`.

    Args:
        arguments: arguments of `llm4msr profile`
        j: hosts x processes per host, [min:]max x processes when elastic
        h: named resource of a host
        image: container image
        job: job file; the flags override it
    """
    return app.component("profile", arguments, job, hosts=j, resource=h, image=image)


def pipeline(
    *arguments: str,
    j: Optional[str] = None,
    h: Optional[str] = None,
    image: Optional[str] = None,
    job: Optional[str] = None,
) -> specs.AppDef:
    """Extracts, trains, evaluates, reports: `torchx run llm4msr.pipeline -j 2x8 -- --config run.yaml`.

    Args:
        arguments: arguments of `llm4msr pipeline`
        j: hosts x processes per host, [min:]max x processes when elastic
        h: named resource of a host
        image: container image
        job: job file; the flags override it
    """
    return app.component("pipeline", arguments, job, hosts=j, resource=h, image=image)
