"""Opt-in autoload: with it, PEFT knows LR-QAT in every process of an environment, without an import of this package.

PEFT has no entry points, so an adapter of a type that nobody registered is a bare `KeyError: 'LRQAT'`. The remedy is
`import peft_lrqat`. For programs whose source you cannot change, `peft-lrqat autoload enable` (or `python -m
peft_lrqat.autoload enable`) writes a one-line `.pth` file into site-packages; what it imports at start-up is
`_peft_lrqat_autoload.py`, which costs no torch import.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from .files import write_atomically

FILE_NAME = "peft_lrqat_autoload.pth"

# `site` executes lines that begin with "import". Uninstalling the package leaves this file behind, and start-up must
# stay silent then.
_LINE = 'import sys; exec("try:\\n import _peft_lrqat_autoload\\nexcept ModuleNotFoundError:\\n pass")\n'


def path(directory: str | os.PathLike | None = None) -> Path:
    """Where the `.pth` file is or would be: in `directory`, or the running environment's site-packages."""
    return Path(sysconfig.get_path("purelib") if directory is None else directory) / FILE_NAME


def is_enabled(directory: str | os.PathLike | None = None) -> bool:
    """Tell whether the `.pth` file is there.

    Args:
        directory (str | os.PathLike | None): as for `enable`.

    Returns:
        True or False.
    """
    return path(directory).is_file()


def enable(directory: str | os.PathLike | None = None) -> Path:
    """Write the `.pth` file, atomically. Then PEFT knows both methods in every process of the environment.

    Args:
        directory (str | os.PathLike | None): a folder that `site` reads `.pth` files from. None: site-packages of the
            running environment.

    Returns:
        The path of the file.

    Raises:
        OSError: the folder does not exist or cannot be written to.

    Examples:
        >>> import os
        >>> from peft_lrqat import autoload
        >>> os.path.basename(autoload.enable("site-packages"))
        'peft_lrqat_autoload.pth'
        >>> autoload.is_enabled("site-packages")
        True
        >>> autoload.disable("site-packages").exists()
        False
    """
    file = path(directory)
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(
            f"{str(file.parent)!r} does not exist or is not writable. Use a virtual environment, or "
            "`import peft_lrqat` in your program."
        )
    write_atomically(file, _LINE)
    return file


def disable(directory: str | os.PathLike | None = None) -> Path:
    """Remove the `.pth` file if it is there.

    Args:
        directory (str | os.PathLike | None): as for `enable`.

    Returns:
        The path where it was looked for.

    Raises:
        OSError: it cannot be removed.
    """
    file = path(directory)
    file.unlink(missing_ok=True)
    return file


def act(action: str, directory: str | os.PathLike | None = None) -> int:
    """Carry out `peft-lrqat autoload ACTION`, and print what was done; returns the exit code.

    Args:
        action: "enable", "disable" or "status".

    Raises:
        OSError: as for `enable` and `disable`.
    """
    if action == "enable":
        print(f"enabled: wrote {enable(directory)}")
    elif action == "disable":
        print(f"disabled: no {disable(directory)}")
    else:
        print(f"{'enabled' if is_enabled(directory) else 'disabled'}: {path(directory)}")
        return 0 if is_enabled(directory) else 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m peft_lrqat.autoload enable|disable|status`; returns the exit code (status: 0 enabled, 1 not)."""
    parser = argparse.ArgumentParser(prog="python -m peft_lrqat.autoload", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("action", choices=("enable", "disable", "status"))
    parser.add_argument("--directory", help="a site directory other than this environment's site-packages")
    args = parser.parse_args(argv)
    try:
        return act(args.action, args.directory)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
