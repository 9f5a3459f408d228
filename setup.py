"""The page of the package on PyPI: the README with links that work there, and the addresses beside it.

All other metadata is in pyproject.toml. ``REPOSITORY_URL`` says where the repository is, here as for the documentation
site; without it the page names the documents that it would link to.
"""

import os
import re
from pathlib import Path

from setuptools import setup

RELATIVE_LINK = re.compile(r"\[([^]]*)]\((?!https?://|#)([^)]*)\)")


def page(readme: str, repository: str, version: str) -> str:
    """The README whose relative links lead to the repository as it was at this version."""
    link = rf"[\1]({repository}/blob/v{version}/\2)" if repository else r"\1"
    return RELATIVE_LINK.sub(link, readme)


def addresses(repository: str) -> dict[str, str]:
    """The links that stand beside the page."""
    if not repository:
        return {}
    documents = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}
    return {
        "Source": repository,
        **{name: f"{repository}/blob/main/{path}" for name, path in documents.items()},
        "Issues": f"{repository}/issues",
    }


if __name__ == "__main__":
    root = Path(__file__).parent
    repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
    version = re.findall('^__version__ = "(.*)"$', (root / "lightning_megatron/__init__.py").read_text(), re.MULTILINE)
    setup(
        long_description=page((root / "README.md").read_text(), repository, version[0]),
        long_description_content_type="text/markdown",
        project_urls=addresses(repository),
    )
