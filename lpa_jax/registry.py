"""Things by name: those of this package, those a user registers, and `package.module:attribute`."""

from collections.abc import Callable, Iterator, Mapping
import difflib
import importlib
import re
import traceback
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries of one kind by name, in the order in which they were registered.

    Args:
      kind: What an entry is, for messages: "method", "network".
      entries: Those of this package.
      made: What an entry must be an instance of; None where that does not tell.

    Example:
      >>> shapes = Registry("shape", {"square": 4})
      >>> shapes.register("triangle", 3)
      >>> shapes.find("triangle"), shapes.find("math:pi") > 3
      (3, True)
      >>> shapes.find("sqare")
      Traceback (most recent call last):
      ...
      ValueError: There is no shape 'sqare'; did you mean square? Known: square, triangle.
    """

    def __init__(self, kind: str, entries: Mapping[str, Entry], made: Any = None):
        """Start with the entries given."""
        self.kind, self._entries, self._made = kind, dict(entries), made

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
          ValueError: If the name is taken by another entry.
          TypeError: If the entry is none.
        """
        self._check(name, entry)
        if self._entries.get(name, entry) is not entry:
            raise ValueError(f"There is a {self.kind} {name!r} already: choose another name.")
        self._entries[name] = entry

    def find(self, name: str) -> Entry | Any:
        """Return an entry by name, or the object that `package.module:attribute` names.

        Raises:
          ValueError: If there is none, or the module cannot be imported.
          TypeError: If it is of another kind.
        """
        if name in self._entries:
            return self._entries[name]
        if ":" not in name:
            raise ValueError(self.unknown(name))
        found = load_object(name)
        self._check(name, found)
        return found

    def _check(self, name: str, entry: Any) -> None:
        made = self._made
        if made is None:
            return
        if isinstance(entry, made) and (made is Callable or not isinstance(entry, type)):
            return
        wanted = "a function or a class" if made is Callable else f"a {made.__name__} object"
        raise TypeError(f"{name!r} is no {self.kind}, but {entry!r:.100}: give {wanted}.")

    def unknown(self, name: str) -> str:
        """Return the sentence for a name that no entry has."""
        # Whether letters are capital does not make names far from each other.
        written = {known.lower(): known for known in self._entries}
        close = [written[one] for one in difflib.get_close_matches(name.lower(), written, n=3)]
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return f"There is no {self.kind} {name!r}; {hint}Known: {', '.join(self._entries)}."

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def load_object(name: str) -> Any:
    """Return the object that `package.module:attribute` names.

    Raises:
      ValueError: If the module cannot be imported, or has no such attribute.

    Example:
      >>> load_object("math:pi")
      3.14159...
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # Of any kind: a module runs code of its own.
        raise ValueError(
            f"{name!r} cannot be imported ({reason(error)}): give "
            "package.module:attribute, with the package installed or in the current directory."
        ) from error
    return found


def reason(error: Exception) -> str:
    """Return in words what an error of a user's own code is, and where it is.

    Example:
      >>> reason(ValueError("no"))
      'ValueError: no'
    """
    told = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, ImportError):
        told = str(error)
    # Neither this package nor what is installed.
    others = re.compile(r"[/\\](lpa_jax|site-packages|python3\.\d+)[/\\]|^<")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not others.search(frame.filename)]
    return f"{told}, {own[-1].filename}:{own[-1].lineno}" if own else told
