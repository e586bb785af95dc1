"""Package metadata. Pure Python: kernels are compiled when they are first used, nothing at install."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="llm4msr",
    version="0.1.0",
    description="Multi-scenario recommendation lifted by a frozen language model, on TorchRec",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{name}{suffix}"
            for name in ("trainer", "embeddings", "llm_knowledge", "launch")
            for suffix in ("", ".*")
        ]
    ),
    package_data={
        "embeddings": ["py.typed"],
        "launch": ["configs/*.yaml", "Dockerfile", "py.typed"],
        "llm_knowledge": ["templates/*.yaml", "py.typed"],
        "trainer": ["report/*.j2", "py.typed"],
    },
    # torch, fbgemm and torchrec move in lockstep and torchrec's own metadata names the CUDA build of
    # fbgemm, so the triple is installed from requirements/ and checked when `embeddings` is imported.
    install_requires=[
        "duckdb>=1.4",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "pyarrow>=20",
        "pydantic>=2.10",
        "pyyaml>=6",
        "safetensors>=0.5",
        "tabulate>=0.9",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        "transformers>=5",
    ],
    extras_require={
        "launch": ["torchx==0.7.0"],
        # Newer clients need an urllib3 that torchx does not take.
        "kubernetes": ["torchx==0.7.0", "kubernetes<32"],
        "spark": ["pyspark>=4.0"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"],
        "dev": [
            "mypy",
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["llm4msr=launch.main:main"],
        # Registering any component hides torchx's own, hence dist and utils again.
        "torchx.components": [
            "llm4msr=launch.cluster.components",
            "dist=torchx.components.dist",
            "utils=torchx.components.utils",
        ],
        "torchx.named_resources": [
            f"{name}=launch.cluster.resources:{name}"
            for name in ("cpu", "a100x8", "h100x8", "h200x8")
        ],
    },
)
