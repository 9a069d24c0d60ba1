"""What setup.cfg cannot say: the README as a package index can show it."""

import pathlib
import re

import setuptools

PICTURE = re.compile(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n\n\*.*?\*\n\n", re.DOTALL)
LINK = re.compile(r"\[([^]]*)\]\((?!https?:|#)([^)#]*)[^)]*\)")


def _name(link: re.Match) -> str:
    text, path = link.groups()
    return path if text == path else f"{text} ({path})"


# On an index a link to a file beside the README leads nowhere: the file is named instead.
readme = (pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8")
readme = LINK.sub(_name, PICTURE.sub("", readme))
setuptools.setup(
    long_description=f"{readme}\nFiles named here are in the source distribution.\n",
    long_description_content_type="text/markdown",
)
