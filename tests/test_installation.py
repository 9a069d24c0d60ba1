"""What is imported and when, the commands by name, and the package as others install it."""

import configparser
import doctest
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

import lpa_jax
from lpa_jax import configs, extras
from lpa_jax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
# Flax, optax and JAX bring the others along.
OURS = ("grain", "matplotlib", "ml_collections", "PIL", "tensorboardX")
WITHOUT_EXTRA = f"import sys; sys.modules |= dict.fromkeys({OURS})\n"


def call(*words, cwd=ROOT, check=False, timeout=300, **env):
    """Run a command without what the tests' own environment would add."""
    there = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [*map(str, words)],
        cwd=cwd, env={**there, "JAX_PLATFORMS": "cpu", **env}, capture_output=True, text=True,
        check=check, timeout=timeout,
    )  # fmt: skip


def python(program, *words, **options):
    options = {"PYTHONPATH": str(ROOT), "check": True} | options
    return call(sys.executable, "-c", program, *words, **options)


def example():
    """Return the first example of the README as a program."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    examples = doctest.DocTestParser().get_examples(blocks[0])
    return "".join(part.source for part in examples)


# Imports


@pytest.mark.guarantee("import")
def test_importing_the_library_imports_nothing_of_the_trainer():
    program = """
import sys, jax, flax.linen, flax.nnx, optax, jaxtyping
before = set(sys.modules)
import lpa_jax
print(*(name for name in set(sys.modules) - before))
"""
    found = python(program).stdout.split()
    assert "lpa_jax.core.program" in found
    assert not set(lpa_jax._LAZY) & {name.split(".")[1] for name in found if "lpa_jax." in name}
    assert not set(extras.TRAIN) & {name.split(".")[0] for name in found}


def test_submodules_need_no_import_of_their_own():
    program = "import lpa_jax; print(*(getattr(lpa_jax, n).__name__ for n in sys.argv[1:]))"
    names = ["data", "evaluation", "losses", "models", "papers", "registry", "splits"]
    names += ["methods", "plots", "tasks", "training", "tables"]
    found = python(f"import sys; {program}", *names).stdout.split()
    assert [name.rpartition(".")[2] for name in found] == names
    assert set(names) <= set(dir(lpa_jax))
    assert lpa_jax.models.SmallCNN
    assert lpa_jax.data.load
    with pytest.raises(AttributeError, match="has no attribute 'lpaa'"):
        _ = lpa_jax.lpaa


@pytest.mark.guarantee("core-alone")
def test_the_example_of_the_readme_needs_no_extra():
    program = f"{WITHOUT_EXTRA}{example()}\nprint(float(loss), *sys.modules)"
    loss, *modules = python(program).stdout.split()
    assert 0 < float(loss) < 10
    assert "lpa_jax.models" in modules
    assert not [name for name in modules if re.match(r"lpa_jax\.(training|tables|data)", name)]


@pytest.mark.guarantee("import")
@pytest.mark.parametrize("module", ["training", "training.loop", "tables", "tables.runs"])
def test_the_trainer_without_its_extra_is_an_error_that_names_it(module):
    done = python(f"{WITHOUT_EXTRA}import lpa_jax.{module}", check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"lpa_jax.{module.split('.')[0]} needs packages that are not installed "
        f"({', '.join(OURS)}): pip install 'lpa_jax[train]'\n"
    )


@pytest.mark.guarantee("import")
@pytest.mark.parametrize("command", [*COMMANDS, "__main__"])
def test_a_command_without_its_extra_ends_in_a_sentence(command):
    run = f"import runpy; runpy.run_module('lpa_jax.{command}', run_name='__main__')"
    done = python(WITHOUT_EXTRA + run, "main", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lpa_jax: The command line needs packages")
    assert done.stderr.endswith("pip install 'lpa_jax[train]'\n")
    assert done.stderr.count("\n") == 1


def test_the_packages_of_the_extra_are_those_that_are_looked_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    names = re.findall(r"^([\w-]+)", setup["options.extras_require"]["train"], re.MULTILINE)
    modules = {"absl-py": "absl", "orbax-checkpoint": "orbax", "pillow": "PIL"}
    assert [modules.get(name, name) for name in names] == [*extras.TRAIN]
    assert all(importlib.util.find_spec(name) for name in extras.TRAIN)
    core = re.findall(r"^([\w-]+)", setup["options"]["install_requires"], re.MULTILINE)
    assert core == ["flax", "jax", "jaxtyping", "numpy", "optax"]


# Configurations


def test_each_file_of_the_folder_is_a_configuration_by_name():
    assert [*configs.FILES] == sorted(
        path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__"
    )
    for name, path in configs.FILES.items():
        # A source distribution has a copy in place of the link.
        assert path.read_bytes() == (ROOT / "configs" / f"{name}.py").read_bytes()


@pytest.mark.guarantee("any-directory")
def test_a_name_and_a_user_file_are_found_from_any_directory(tmp_path):
    own = tmp_path / "digits.py"
    own.write_text(
        (ROOT / "configs" / "digits.py").read_text().replace("config.epochs = 30", "BROKEN")
    )
    # A name is the package's even where a file or a directory is called like it.
    (tmp_path / "digits").mkdir()
    program = """
import sys
import tarfile
import venv
import zipfile
from lpa_jax import main
from absl import flags
flags.FLAGS(sys.argv)
print(main._CONFIG.value.epochs)
"""
    named = python(program, "--config=digits:method=lpa,smoke", cwd=tmp_path)
    assert named.stdout.split() == ["2"]
    mine = python(program, "--config=digits.py", cwd=tmp_path, check=False)
    assert "BROKEN" in mine.stderr


# Commands


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ((), 2, "lpa_jax: Say what to do: the first word is a command."),
        (("tabel", "--table=digits"), 2, "There is no command 'tabel': did you mean table?"),
        (("--config=digits",), 2, "There is no command '--config=digits': give one of these"),
        (("--help",), 0, "lpa-jax COMMAND [--OPTION=VALUE ...]"),
    ],
)
def test_an_unknown_command_lists_the_commands(words, code, sentence):
    done = call(sys.executable, "-m", "lpa_jax", *words)
    assert done.returncode == code
    told = done.stderr if code else done.stdout
    assert sentence in told
    assert "Traceback" not in told
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", told, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_by_name_is_its_module(command, tmp_path):
    by_name, by_module = (
        call(sys.executable, "-m", *words, "--nothing", cwd=tmp_path, PYTHONPATH=str(ROOT))
        for words in (("lpa_jax", command), (f"lpa_jax.{command}",))
    )
    assert "There is no --nothing" in by_name.stderr
    assert (by_name.returncode, by_name.stderr) == (by_module.returncode, by_module.stderr)


def test_every_module_that_is_a_command_is_listed():
    running = re.compile(r"^    commands\.run\(", re.MULTILINE)
    modules = [
        path.stem for path in (ROOT / "lpa_jax").glob("*.py") if running.search(path.read_text())
    ]
    assert sorted(modules) == sorted(COMMANDS)


# The package as it is installed elsewhere: each environment is made anew, from a package index


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Return the source tree, the wheel and the source distribution that were built of it."""
    place = tmp_path_factory.mktemp("distributions")
    # What building leaves behind stays out of the clone.
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")
    tree = shutil.copytree(ROOT, place / "tree", symlinks=True, ignore=ignored)
    tools = environment(place / "tools", "build", "twine")
    call(tools / "python", "-m", "build", tree, f"--outdir={place / 'dist'}", check=True)
    (wheel,), (sdist,) = (place.glob(f"dist/*.{ending}") for ending in ("whl", "tar.gz"))
    call(tools / "python", "-m", "twine", "check", "--strict", wheel, sdist, check=True)
    return tree, wheel, sdist


def environment(place, *packages):
    """Return the directory of the programs of a new environment that has these packages."""
    venv.create(place, with_pip=True)
    programs = place / "bin"
    call(programs / "python", "-m", "pip", "install", *packages, check=True, timeout=1200)
    call(programs / "python", "-m", "pip", "check", check=True)
    return programs


def installed(programs):
    listed = call(programs / "python", "-m", "pip", "list", "--format=json", check=True).stdout
    return {package["name"].lower().replace("_", "-") for package in json.loads(listed)}


TRAINERS = {"grain", "matplotlib", "ml-collections", "pillow", "tensorboardx"}


@pytest.mark.guarantee("core-alone")
@pytest.mark.slow
def test_the_core_is_installed_without_the_trainer(distributions, tmp_path):
    programs = environment(tmp_path / "venv", distributions[1])
    assert "lpa-jax" in installed(programs)
    assert not (TRAINERS | {"scikit-learn"}) & installed(programs)
    program = f"{example()}\nprint(float(loss), lpa_jax.__file__)"
    loss, file = call(programs / "python", "-c", program, cwd=tmp_path, check=True).stdout.split()
    assert 0 < float(loss) < 10
    assert pathlib.Path(file).is_relative_to(tmp_path)
    done = call(programs / "lpa-jax", "main", "--config=digits", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("pip install 'lpa_jax[train]'\n")


@pytest.mark.guarantee("any-directory")
@pytest.mark.slow
def test_the_trainer_runs_from_any_directory_however_it_is_installed(distributions, tmp_path):
    tree, wheel, _ = distributions
    programs = environment(tmp_path / "venv", f"lpa_jax[train] @ {wheel.as_uri()}")
    assert installed(programs) > TRAINERS
    assert "scikit-learn" not in installed(programs)
    run = ["--config=digits:method=lpa,smoke", f"--workdir={tmp_path / 'run'}"]
    table = ["--table=digits", "--methods=erm,lpa", "--config.num_seeds=1"]
    table += ["--config.epochs=1", "--dry_run"]
    done = call(programs / "lpa-jax", "main", *run, cwd=tmp_path, check=True)
    assert "test accuracy %" in done.stdout
    call(programs / "lpa-jax", "evaluate", run[1], cwd=tmp_path, check=True)
    done = call(programs / "python", "-m", "lpa_jax.table", *table, cwd=tmp_path, check=True)
    assert "About 0:0" in done.stdout

    pip = (programs / "python", "-m", "pip", "install", "--no-deps")
    call(*pip, "--editable", tree, check=True)
    for options in ({"cwd": tmp_path}, {"cwd": "/", "PYTHONPATH": str(tree)}):
        program = "from lpa_jax import configs; print(configs.FILES['digits'])"
        found = call(programs / "python", "-c", program, check=True, **options).stdout.strip()
        assert pathlib.Path(found).samefile(tree / "configs" / "digits.py")
    done = call(programs / "lpa-jax", "table", *table, cwd=tmp_path, check=True)
    assert "About 0:0" in done.stdout


@pytest.mark.slow
def test_the_description_has_no_link_that_an_index_cannot_follow(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(name).decode()
    assert "# lpa_jax" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 20
    assert not [link for link in links if not link.startswith("https://")]


@pytest.mark.guarantee("source-distribution")
@pytest.mark.slow
def test_the_source_distribution_passes_its_tests(distributions, tmp_path):
    with tarfile.open(distributions[2]) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    there = {path.relative_to(tree) for path in tree.rglob("*") if path.suffix in (".py", ".md")}
    for folder in ("tests", "benchmarks", "configs", "docs", "lpa_jax"):
        here = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.[pm][yd]")}
        assert here
        assert here <= there, folder
    names = ("benchmarks", "data", "design", "installation", "papers")
    files = [f"tests/test_{name}.py" for name in names]
    done = call(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files,
        "lpa_jax", "README.md", cwd=tree, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
