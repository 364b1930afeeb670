"""Installation: `pip install -c constraints.txt -e .` into an environment of its own."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

TOP_LEVEL_FILES = ("model_table.yaml",)
VERSION_FILE = Path(__file__).parent / "hosts" / "http" / "__init__.py"


class BuildWithTable(build_py):
    """The model table is read from beside the packages, in the repository and in an installation
    alike.
    """

    def run(self) -> None:
        super().run()
        for name in TOP_LEVEL_FILES:
            self.copy_file(name, str(Path(self.build_lib) / name))


setup(
    name="diffusion-launcher",
    version=runpy.run_path(str(Path(__file__).parent / "hosts" / "http" / "__init__.py"))[
        "VERSION"
    ],
    description="Serve one diffusion model on several GPUs over HTTP",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    py_modules=["launcher"],
    packages=[
        *find_packages(include=["hosts", "hosts.*", "backends", "backends.*"]),
        "diffusion_client",
    ],
    package_dir={"diffusion_client": "clients/python/diffusion_client"},
    package_data={"hosts.http.page": ["*.html", "*.css", "*.js"]},
    cmdclass={"build_py": BuildWithTable},
    entry_points={"console_scripts": ["diffusion-launcher=launcher:main"]},
    install_requires=[
        "torch==2.13.0",
        "diffusers==0.42.1",
        "huggingface_hub>=2.4,<3",
        "transformers",
        "accelerate",
        "peft",
        "safetensors",
        "ftfy",
        "sentencepiece",
        "scipy",
        "torchsde",
        "numpy",
        "pillow",
        "flask",
        "cheroot",
        "pydantic",
        "pyyaml",
        "prometheus-client",
        "psutil",
    ],
    extras_require={
        "options": ["bitsandbytes", "compel", "gguf"],
        "video": ["imageio", "imageio-ffmpeg"],
        "ray": ["ray"],
        "localai": ["grpcio", "grpcio-tools"],
        "test": [
            "grpcio",
            "grpcio-tools",
            "hypothesis",
            "imageio",
            "imageio-ffmpeg",
            "openai",
            "openapi-spec-validator",
            "pytest",
            "pytest-rerunfailures",
            "pytest-timeout",
            "pytest-xdist",
            "requests",
            "ruff",
            "schemathesis",
            "selenium",
            "webuiapi",
        ],
    },
)
