"""The package is built in layers: each imports only what lies below it."""

import ast
import pathlib

import pytest

import lpa_jax

ROOT = pathlib.Path(lpa_jax.__file__).parent
# From below. A module or package is of the first layer that names it or a package around it; those
# of one layer do not import each other, and `None` stands for the public names of `lpa_jax` itself.
LAYERS = [
    ["core"],
    ["extras", "losses", "memory", "papers", "plots", "registry"],
    ["backends", "tasks", "transforms"],
    ["methods"],
    ["api"],
    [None],
    ["data", "models"],
    ["training"],
    ["evaluation"],
    ["tables"],
    ["listing"],
    ["commands"],
    ["__main__", "main", "evaluate", "export", "pack", "table", "weights"],
]
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports_of(path):
    """Return the modules of this package that a file imports, under their top name."""
    found = set()
    tree = ast.parse(path.read_text())
    # What is imported late, by the package itself, is declared for type checkers alone.
    tree.body = [
        node for node in tree.body if not ast.unparse(node).startswith("if typing.TYPE_CHECKING")
    ]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "lpa_jax":
            names = [f"lpa_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [node.module]
        for name in names:
            if name.split(".")[0] == "lpa_jax":
                top = name.split(".")[1] if "." in name else None
                found.add(top if top in RANKS else None)
    return found


def top_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return None if parts == ("__init__",) else parts[0]


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_lower_layers_only(path):
    own = top_of(path)
    above = {name for name in imports_of(path) - {own} if RANKS[name] >= RANKS[own]}
    assert not above


def test_every_layer_is_there():
    assert {top_of(path) for path in FILES} == set(RANKS)


def test_the_core_knows_no_library_of_layers():
    for path in (ROOT / "core").glob("*.py"):
        assert not {"flax", "haiku", "equinox", "ml_collections"}.intersection(
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        )


def test_each_method_has_a_file_of_its_name():
    files = {path.stem for path in (ROOT / "transforms").glob("*.py") if path.stem[0] != "_"}
    assert files == {*lpa_jax.methods.METHODS, "adaptive"}
    for name in files:
        assert getattr(lpa_jax, name).__module__ == f"lpa_jax.transforms.{name}"
