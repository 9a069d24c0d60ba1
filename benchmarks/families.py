"""Steps with LPA in families of models: sites, differences from the same by hand, FLOPs.

    python benchmarks/families.py [--only=NAME ...] [--out=FILE.json] [--table=FILE.md]

Every family of `tests/helpers/families` whose package is installed is measured as
`tests/test_families.py` does it. The table goes between the two marks in a file that has them. With
`--out`, rows that the file has are not measured again, unless they are named by `--only`.
"""

import argparse
import collections
import gc
import importlib
import importlib.util
import json
import pathlib
import sys
import warnings

import jax
import record

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
COLUMNS = (
    *("family", "layers by", "sites", "refused"),
    *("empty chain", "zero strength", "LPA by hand", "FLOPs", "tail"),
)
BEGIN, END = "<!-- begin: benchmarks/families.py -->", "<!-- end -->"


def rows_of(path):
    return json.loads(path.read_text())["rows"] if path is not None and path.exists() else []


def measured(families, only, rows, out):
    """Measure the families and return their rows; each is written as soon as it is there."""
    kept = {row["family"]: row for row in rows}
    for name, family in families.FAMILIES.items():
        imported = families.IMPORTED.get(family.package, family.package)
        if imported and importlib.util.find_spec(imported) is None:
            print(f"{name}: {family.package} is not installed", file=sys.stderr)
            continue
        if name in (kept if only is None else set(families.FAMILIES) - set(only)):
            continue
        version = families.version_of(family.package) if family.package else ""
        made = {"library": family.library, "package": family.package, "version": version}
        kept[name] = {"family": name, **made, **families.measure(family.build())}
        print(kept[name], flush=True)
        write(families, kept, out)
        # The programs of one family are of no use to the next.
        jax.clear_caches()
        gc.collect()
    write(families, kept, out)
    return [kept[name] for name in families.FAMILIES if name in kept]


def write(families, kept, out):
    rows = [kept[name] for name in families.FAMILIES if name in kept]
    record.write(out, rows, epsilon=families.EPSILON, steps=families.STEPS, batch=families.BATCH)


def table(rows):
    """Return the rows as Markdown: the table, and why layers were refused."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    reasons = collections.Counter()
    letters = {}
    for row in rows:
        for reason, number in row["reasons"].items():
            reasons[reason] += number
            letters.setdefault(reason, chr(ord("a") + len(letters)))
        whose = f" ({row['package']} {row['version']})" if row["package"] else ""
        why = ", ".join(f"{number}{letters[reason]}" for reason, number in row["reasons"].items())
        figures = [f"{row[name]:.0e}" if row[name] else "0" for name in ("empty", "zero", "lpa")]
        cells = [row["family"] + whose, row["library"], str(row["sites"]), why or "0", *figures]
        cells += ["loop" if row["loop"] else f"{row['flops']:.2f}", f"{row['tail']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Why layers were refused, and how many over all families:", ""]
    lines += [f"- {letter}: {reason} ({reasons[reason]})" for reason, letter in letters.items()]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="Names of families; default all.")
    parser.add_argument("--out", type=pathlib.Path, help="Write the figures as JSON.")
    parser.add_argument("--table", type=pathlib.Path, help="Put the table in this Markdown file.")
    args = parser.parse_args()
    families = importlib.import_module("families")
    warnings.simplefilter("ignore")
    for module in families.MODULES:
        importlib.import_module(f"families.{module}")
    text = table(measured(families, args.only, rows_of(args.out), args.out))
    if args.table is None:
        print(text)
        return
    before, rest = args.table.read_text().split(BEGIN)
    _, after = rest.split(END)
    args.table.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


if __name__ == "__main__":
    main()
