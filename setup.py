"""The packages: those of ftjax/, and configs/ as ftjax.configs. Everything else is in setup.cfg."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["ftjax*"]), "ftjax.configs"], package_dir={"ftjax.configs": "configs"})
