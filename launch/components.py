"""torchx components: stages of this project as jobs of one or many hosts.

The job itself runs torchrun and never imports torchx, whose pins stay out of a training image.
"""

# torchx reads these signatures as source text and knows no newer spelling of the types.
from typing import Dict, List, Optional  # noqa: UP035

import torchx.specs as specs
from torchx.components.dist import ddp

# Restarted workers would meet their dead predecessors' keys in the store that agents and workers
# share by default since torch 2.5: every restart then fails on the port of a process that is gone.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def train(
    *arguments: str,
    j: str = "1x2",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = "",
    max_restarts: int = 3,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    env: Optional[Dict[str, str]] = None,
) -> specs.AppDef:
    """Trains a run: `torchx run llm4msr.train -j 2x8 -- --config run.yaml`.

    Args:
        arguments: arguments of `llm4msr train`
        j: hosts x processes per host, [min:]max x processes when elastic
        h: named resource of a host, instead of cpu, gpu and memMB
        cpu: cores per host
        gpu: GPUs per host
        memMB: memory per host
        image: container image, or directory for local schedulers
        max_restarts: restarts of the workers before the job fails
        max_retries: restarts of the job by the scheduler
        rdzv_port: rendezvous port on the first host, when there are several
        env: further environment variables
    """
    # A restarted worker continues from the newest checkpoint of its run.
    return _stage(
        ["train", "--resume", *arguments],
        j,
        h,
        cpu,
        gpu,
        memMB,
        image,
        max_restarts,
        max_retries,
        rdzv_port,
        env,
    )


def extract(
    *arguments: str,
    j: str = "1x2",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = "",
    max_restarts: int = 3,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    env: Optional[Dict[str, str]] = None,
) -> specs.AppDef:
    """Extracts knowledge: `torchx run llm4msr.extract -j 2x8 -- --data DATA --level all --out STORES`.

    Args:
        arguments: arguments of `llm4msr knowledge extract`
        j: hosts x processes per host, [min:]max x processes when elastic
        h: named resource of a host, instead of cpu, gpu and memMB
        cpu: cores per host
        gpu: GPUs per host
        memMB: memory per host
        image: container image, or directory for local schedulers
        max_restarts: restarts of the workers before the job fails
        max_retries: restarts of the job by the scheduler
        rdzv_port: rendezvous port on the first host, when there are several
        env: further environment variables
    """
    words = ["knowledge", "extract", *arguments]
    return _stage(words, j, h, cpu, gpu, memMB, image, max_restarts, max_retries, rdzv_port, env)


def _stage(
    words: List[str],
    j: str,
    h: Optional[str],
    cpu: int,
    gpu: int,
    memory: int,
    image: str,
    max_restarts: int,
    max_retries: int,
    rdzv_port: int,
    env: Optional[Dict[str, str]],
) -> specs.AppDef:
    app = ddp(
        *words,
        m="launch",
        name=f"llm4msr-{words[0]}",
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memory,
        j=j,
        env=ENVIRONMENT | (env or {}),
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )
    for role in app.roles:
        # torchx's own component passes no --max-restarts, so a lost worker would end the job.
        flag, command = role.args
        role.args = [
            flag,
            command.replace("torchrun ", f"torchrun --max-restarts {max_restarts} ", 1),
        ]
    return app
