"""`deepseek-latent run` runs a tool as python would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_latent.commands.__main__ import main
from tests.commands.terminal import assert_refused, printed


@pytest.fixture
def restored_process(monkeypatch):
    """Restores what `run` changes in this process."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_run_gives_a_script_the_plugin_its_arguments_and_its_folder(tmp_path, capsys, restored_process):
    (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")
    (tmp_path / "tool.py").write_text(
        "import sys, neighbour\n"
        "from transformers import AutoConfig\n"
        "print(__name__, sys.argv[1:], sys.path[0], neighbour.NAME)\n"
        "print(type(AutoConfig.for_model('deepseek_v2')).__module__)\n"
    )
    status, out, _ = printed(capsys, "run", tmp_path / "tool.py", "--flag", "-m", "x", "--", "y")
    assert status == 0
    assert out.splitlines() == [
        f"__main__ ['--flag', '-m', 'x', '--', 'y'] {tmp_path} neighbour",
        "deepseek_latent.configuration_deepseek_v2",
    ]


def test_run_m_runs_a_module_of_the_working_folder(tmp_path, capsys, restored_process, monkeypatch):
    (tmp_path / "lonely_tool.py").write_text("import sys\nprint(__name__, sys.argv, sys.path[0])\n")
    monkeypatch.chdir(tmp_path)
    status, out, _ = printed(capsys, "run", "-m", "lonely_tool", "--model", "m", "-m", "n")
    assert status == 0
    argv = [str(tmp_path / "lonely_tool.py"), "--model", "m", "-m", "n"]
    assert out == f"__main__ {argv} {tmp_path}\n"


def test_run_m_runs_the_main_of_a_package(tmp_path, capsys, restored_process, monkeypatch):
    (tmp_path / "packed_tool").mkdir()
    (tmp_path / "packed_tool" / "__init__.py").touch()
    (tmp_path / "packed_tool" / "__main__.py").write_text("print('main of', __package__)\n")
    monkeypatch.chdir(tmp_path)
    assert printed(capsys, "run", "-m", "packed_tool")[:2] == (0, "main of packed_tool\n")


@pytest.mark.parametrize("code", [0, 3, "broken"])
def test_run_exits_with_the_tools_exit_code(tmp_path, restored_process, code):
    (tmp_path / "tool.py").write_text(f"raise SystemExit({code!r})\n")
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(tmp_path / "tool.py")])
    assert stopped.value.code == code


def test_the_tools_own_errors_keep_their_traceback(tmp_path, restored_process):
    (tmp_path / "tool.py").write_text("raise ValueError('of the tool')\n")
    with pytest.raises(ValueError, match="of the tool"):
        main(["run", str(tmp_path / "tool.py")])


def test_a_package_that_the_tool_lacks_is_the_tools_own_error(tmp_path, restored_process, monkeypatch):
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "__init__.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        main(["run", "-m", "lacking.tool"])


def test_run_refuses_in_one_sentence(tmp_path, capsys, restored_process, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mainless").mkdir()
    (tmp_path / "mainless" / "__init__.py").touch()
    assert_refused(capsys, "run", saying="expected -m MODULE or a script")
    assert_refused(capsys, "run", "-m", saying="expected -m MODULE or a script")
    assert_refused(capsys, "run", tmp_path / "absent.py", saying="does not exist")
    assert_refused(capsys, "run", "-m", "a_module_nobody_has", saying="not found")
    assert_refused(capsys, "run", "-m", "a_package_nobody_has.tool", saying="not found")
    assert_refused(capsys, "run", "-m", "mainless", saying="not found")


# what `torchrun` and `accelerate launch` run, with the option for two processes
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
}
ONE_MACHINE = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_process_of_a_launcher_has_the_plugin_and_the_scripts_arguments(launcher, tmp_path):
    (tmp_path / "tool.py").write_text(
        "import sys, torch, torch.distributed as dist\n"
        "from transformers import AutoConfig\n"
        "dist.init_process_group('gloo')\n"
        "sum_of_ranks = torch.tensor(dist.get_rank() + 1)\n"
        "dist.all_reduce(sum_of_ranks)\n"
        "module = type(AutoConfig.for_model('deepseek_v2')).__module__\n"
        "open(f'rank{dist.get_rank()}', 'w').write(f'{sum_of_ranks} {module} {sys.argv[1:]}')\n"
        "dist.destroy_process_group()\n"
    )
    options = LAUNCHERS[launcher] + (ONE_MACHINE if launcher == "accelerate" else [])
    command = [sys.executable, "-m", *options, "-m", "deepseek_latent", "run", "tool.py", "--lr", "1"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths})
    expected = "3 deepseek_latent.configuration_deepseek_v2 ['--lr', '1']"
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [expected, expected]
