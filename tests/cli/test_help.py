"""Every option of every command has a line of help; asking for it is quick because nothing heavy is imported."""

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import tyro

from deepseek_jax.cli.main import COMMANDS, main


class AskedError(Exception):
    """Thrown where a command would read its arguments."""


def configuration(command: str, monkeypatch) -> type:
    """The dataclass that a command's options fill."""

    def instead(kind, **options):
        raise AskedError(kind)

    monkeypatch.setattr(tyro, "cli", instead)
    module = importlib.import_module(f"deepseek_jax.cli.{COMMANDS[command]}")
    with pytest.raises(AskedError) as asked:
        getattr(module, f"run_{command.replace('-', '_')}")([])
    return asked.value.args[0]


def options(parser) -> Iterator[tuple[str, str]]:
    """(name, help) of a parser's arguments, and of its subcommands'."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from options(inner)
        else:
            yield action.dest, re.sub(r"\((default|required|repeatable|optional).*", "", action.help or "").strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command, monkeypatch):
    kind = configuration(command, monkeypatch)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of get_parser, the one way to the options
        found = [*options(tyro.extras.get_parser(kind))]
    assert len(found) > 1
    assert not [name for name, text in found if not text]


def test_help_version_and_a_wrong_command_wait_for_no_jax():
    """Nor does the package itself, whose names are imported when they are asked for."""
    program = (
        "import sys; from deepseek_jax.cli.main import main;"
        "print([main([a]) for a in ('--help', '--version', 'pretrian')], {'jax', 'tyro', 'rich'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 2] set()"
    assert "did you mean pretrain?" in done.stderr


def test_what_the_package_lends_is_there():
    import deepseek_jax

    assert all(getattr(deepseek_jax, name).__name__ == name for name in deepseek_jax.__all__)
    assert {*deepseek_jax.__all__} <= {*dir(deepseek_jax)}
    with pytest.raises(AttributeError, match="no attribute 'Enginee'"):
        deepseek_jax.Enginee  # noqa: B018


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert re.match(r"deepseek-jax \d+\.\d+\S* \(jax \d", capsys.readouterr().out)
