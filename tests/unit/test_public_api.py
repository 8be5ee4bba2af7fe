"""One screen of public names, each documented, and one tree of errors."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import mtpdecode
from mtpdecode import errors

ROOT = Path(mtpdecode.__file__).parent
IMPORTS = [node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.ImportFrom)]
EXPORTED = [(node.module or "", alias) for node in IMPORTS for alias in node.names]
NAMES = [alias.name for _, alias in EXPORTED]

PROMISED = {"MTPDecoder", "MTPHead", "MTPSpec", "MTPOutput", "MTPProposer", "NGramProposer", "Proposer", "Draft", "Acceptance"}
PROMISED |= {"KVCacheManager", "RaggedCache", "CropCache", "DraftSchedule", "Metrics", "generate", "load", "families"}
PROMISED |= {"LLM", "SamplingParams", "testing"}
PROMISED |= {"MTPDecodeError", "UnsupportedModelError", "HeadWeightsError", "CheckpointError", "CacheError", "GenerationError"}


def test_what_is_promised_is_there():
    assert set(NAMES) >= PROMISED, f"missing: {PROMISED - set(NAMES)}"


def test_exports_are_explicit_sorted_and_once():
    assert all(alias.asname == alias.name for _, alias in EXPORTED), "`x as x`, so that type checkers see a re-export"
    assert all(len(node.names) == 1 for node in IMPORTS), "one name a line"
    order = [(module, alias.name) for module, alias in EXPORTED]
    as_ruff_has_it = sorted(order, key=lambda each: (each[0], each[1][0].islower(), each[1].lower()))
    assert order == as_ruff_has_it, "sorted by file, then by name, classes first"
    assert len(set(NAMES)) == len(NAMES)


def test_nothing_else_is_public():
    found = {name for name in vars(mtpdecode) if not name.startswith("_") and not inspect.ismodule(getattr(mtpdecode, name))}
    assert found == set(NAMES) - {"testing"}, f"public, and not exported as such: {found - set(NAMES)}"


def test_the_roof_fits_on_a_screen():
    assert len((ROOT / "__init__.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented(name):
    thing = getattr(mtpdecode, name)
    assert vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__, f"{name} has no docstring of its own"
    if not inspect.isclass(thing):
        return
    for member, value in vars(thing).items():
        if member.startswith("_") or not (inspect.isroutine(value) or isinstance(value, property)):
            continue
        if "_asdict" in vars(thing) and member in ("count", "index"):
            continue
        assert inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring, own or inherited"


@pytest.mark.parametrize("name", NAMES)
def test_every_public_function_says_its_types(name):
    thing = getattr(mtpdecode, name)
    functions = [thing] if inspect.isfunction(thing) else [f for f in vars(thing).values() if inspect.isfunction(f)]
    for function in functions:
        if function.__module__.startswith("mtpdecode") and not function.__name__.startswith("_"):
            assert "return" in function.__annotations__, f"{function.__qualname__} does not say what it returns"


def test_types_travel_with_the_package():
    assert (ROOT / "py.typed").exists()


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

TREE = {name: thing for name, thing in vars(errors).items() if inspect.isclass(thing) and issubclass(thing, Exception)}


def test_the_tree_is_the_one_in_the_docstring():
    drawn = re.findall(r"[├└]── (\w+) +\(also (\w+)\)", errors.__doc__)
    assert {name for name, _ in drawn} | {"MTPDecodeError"} == set(TREE), "drawn and defined are not the same"
    for name, also in drawn:
        built_in = vars(__builtins__)[also] if inspect.ismodule(__builtins__) else __builtins__[also]
        assert TREE[name].__bases__ == (errors.MTPDecodeError, built_in), f"{name} is a MTPDecodeError, also {also}"


def test_every_error_is_public():
    assert set(TREE) <= set(NAMES)


def test_everything_that_is_raised_is_of_the_tree():
    """But for what the command line needs, and failed proofs in testing.py."""
    others = {"__main__": {"SystemExit"}, "cli": {"SystemExit", "argparse.ArgumentTypeError"}, "testing": {"AssertionError"}}
    for path in ROOT.glob("*.py"):
        allowed = set(TREE) | others.get(path.stem, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                assert name in allowed, f"{path.name}:{node.lineno} raises {name}, which is not of our tree"
