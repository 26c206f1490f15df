"""A command that is interrupted, or whose output is closed, ends with its exit code and without a traceback."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepseek_latent.commands.__main__ import main
from tests.commands.terminal import printed

COMMANDS = [
    ["generate", "MODEL", "PROMPT"],
    ["inspect", "MODEL"],
    ["convert", "cast", "SRC", "OUT"],
    ["convert", "adapter", "SRC", "OUT"],
    ["verify", "MODEL"],
    ["experts", "MODEL", "--text", "FILE"],
    ["export-code", "MODEL"],
    ["run", "-m", "MODULE"],
]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def interrupted(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def interrupt(arguments):
        raise KeyboardInterrupt

    def parse_and_interrupt(self, argv):
        arguments = parse(self, argv)
        arguments.action = "interrupted:interrupt"
        return arguments

    monkeypatch.setitem(sys.modules, "deepseek_latent.commands.interrupted", SimpleNamespace(interrupt=interrupt))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_interrupt)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command[:2]))
def test_every_command_that_is_interrupted_exits_with_130_and_one_line(command, interrupted, capsys):
    assert printed(capsys, *command) == (130, "", "deepseek-latent: interrupted\n")


def test_a_tool_that_is_interrupted_exits_with_130_and_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tool.py").write_text("print('works')\nraise KeyboardInterrupt\n")
    assert printed(capsys, "run", tmp_path / "tool.py") == (130, "works\n", "deepseek-latent: interrupted\n")


def test_an_interrupt_while_the_package_is_imported_leaves_no_traceback():
    code = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *others):\n"
        "        if name == 'transformers': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from deepseek_latent_command import main\n"
        "sys.exit(main(['inspect', 'MODEL']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "deepseek-latent: interrupted\n")


@pytest.mark.parametrize("command", ["--help", "inspect", "verify"])
def test_a_closed_output_ends_a_command_without_a_word_about_it(command, folder, capsys, monkeypatch):
    end, beginning = os.pipe()
    os.close(end)
    with os.fdopen(beginning, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main([command] if command == "--help" else [command, str(folder)]) == 141
        monkeypatch.undo()
    # lines about progress
    assert all(line.endswith(" ...") for line in capsys.readouterr().err.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)], ids=str)
def test_a_signal_ends_a_generation_without_a_traceback(number, status, folder):
    # a shell ignores interrupts for what it runs in the background
    code = (
        "import signal, sys; from deepseek_latent_command import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "generate", str(folder), "text", "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        # the prompt is printed before the first new token
        assert process.stdout.read(4) == b"text"
        process.send_signal(number)
        process.stdout.read()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait() == status
