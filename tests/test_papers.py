import ast
import pathlib
import re

import pytest

from lpa_jax.papers import PAPERS

ROOT = pathlib.Path(__file__).parent.parent
NUMBER = re.compile(r"(?<!\d)(\d{4}\.\d{4,5})(?!\d)")
BY_NUMBER = {paper.arxiv: paper for paper in PAPERS.values() if paper.arxiv}
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("lpa_jax/**/*.md")]
MODULES = [*ROOT.glob("lpa_jax/**/*.py"), *ROOT.glob("configs/*.py")]
NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, NODES)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def numbers(text):
    """Return the places of arXiv's numbers: after its name, or in a link."""
    return [
        match
        for match in NUMBER.finditer(text)
        if re.search(r"(arXiv:\s*|arxiv\.org/abs/)$", text[: match.start()])
    ]


def faults(text):
    """Return the numbers that are not in the list, or that do not follow their citation."""
    text = " ".join(text.replace("*", "").split())
    # Of a link only the address is read.
    text = re.sub(r"\[[\d.]+\]\(https://arxiv\.org/abs/([\d.]+)\)", r"arXiv:\1", text)
    wrong = []
    for match in numbers(text):
        paper = BY_NUMBER.get(match[1])
        if paper is None or not re.search(
            re.escape(paper.citation) + r",? arXiv:$", text[: match.start()]
        ):
            wrong.append(match[1])
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_give_papers_their_titles(path):
    assert not faults(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_give_papers_their_titles(path):
    for text in docstrings(path):
        before, _, references = text.partition("References:")
        assert not faults(references)
        assert not [match[1] for match in numbers(before) if match[1] not in BY_NUMBER]


def test_the_files_checked_contain_references():
    sections = [text for path in MODULES for text in docstrings(path) if "References:" in text]
    assert sum(len(numbers(text)) for text in sections) > 30
    assert len(numbers((ROOT / "README.md").read_text())) > 20


def test_faults_are_found():
    right = f"{PAPERS['sam'].citation}, arXiv:2010.01412."
    assert not faults(right)
    assert not faults(
        "Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware\n"
        "Margin Loss*, NeurIPS 2019, [1906.07413](https://arxiv.org/abs/1906.07413)"
    )
    assert faults(right.replace("Efficiently", "Quickly")) == ["2010.01412"]
    assert faults(right.replace("2010.01412", "2010.01413")) == ["2010.01413"]
    assert faults(f"{right} arXiv:2102.11600") == ["2102.11600"]


def test_each_paper_is_listed_once():
    found = [paper.arxiv for paper in PAPERS.values() if paper.arxiv]
    assert len(found) == len(set(found))
