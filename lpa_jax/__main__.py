"""The commands of the package, `lpa-jax COMMAND`, and as well `python -m lpa_jax COMMAND`."""

import difflib
import os
import runpy
import sys

COMMANDS = {
    "main": "Train a configuration.",
    "evaluate": "Evaluate a run again, from its last checkpoints.",
    "export": "Write the network of a run as a file that needs no code of this package.",
    "pack": "Decode the images of a data set once, for later runs.",
    "table": "Train a table of methods, and compare them.",
    "weights": "Show the weights of a file or run, or write those of a run as safetensors.",
}
"""The modules that are commands, and what each does."""


def main() -> None:
    """Run the command that the first word of the command line names."""
    listed = "\n".join(f"  {name:{max(map(len, COMMANDS))}}  {COMMANDS[name]}" for name in COMMANDS)
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in ("-h", "-help", "--help"):
        print(
            f"lpa-jax COMMAND [--OPTION=VALUE ...]\n\n{listed}\n\nCOMMAND --help lists its options."
        )
        return
    if word in ("-list", "--list"):
        word = "main"
        sys.argv.insert(1, word)
    if word not in COMMANDS:
        told = "Say what to do: the first word is a command."
        if word:
            close = difflib.get_close_matches(word, COMMANDS, n=1)
            told = f"There is no command {word!r}: "
            told += f"did you mean {close[0]}?" if close else "give one of these first."
        print(f"lpa_jax: {told}\n{listed}", file=sys.stderr)
        sys.exit(2)
    # Where `python -m` looks too: there may be networks of the user's own.
    if os.getcwd() not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    del sys.argv[1]
    runpy.run_module(f"lpa_jax.{word}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
