"""The layout is a house: a file imports from lower floors only, and files on one floor do not know each other."""

import ast
from pathlib import Path

import pytest

import mtpdecode

FLOORS = (
    "errors spec distances state metrics recurrent attention ways frames",  # 0  ground: data, tables, arithmetic on their own
    "sampling stopping families checkpoint target layers blocks indexer schedule vocabulary packing",  # 1  what raises our errors
    "acceptance cache head media parity",  # 2  the parts
    "request proposer verifier loading laws rehearsal",  # 3  the roles, and what fills them
    "loop tables assistant",  # 4  the loop
    "captured",  # 5  the loop's rounds, their kernels recorded
    "compiled",  # 6  the loop's rounds as graphs
    "decoder train",  # 7  what people type
    "presets testing llm",  # 8  what is built on the decoder
    "cli",  # 9  the command line
    "__main__ __init__",  # 10  the roof
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
FILES = sorted(Path(mtpdecode.__file__).parent.glob("*.py"))


def imports(path):
    """(line, file of ours that is imported), wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path.name}:{node.lineno}: the package is flat"
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield node.lineno, name.split(".")[0]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                assert name.split(".")[0] != "mtpdecode", f"{path.name}:{node.lineno}: a file of ours imports ours with a dot"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_go_down(path):
    assert path.stem in FLOOR, f"{path.name} is on no floor: write it into FLOORS"
    for line, name in imports(path):
        where = f"{path.name}:{line}"
        assert FLOOR[name] != FLOOR[path.stem], f"{where} imports {name}, a sibling on floor {FLOOR[name]}"
        assert FLOOR[name] < FLOOR[path.stem], f"{where} (floor {FLOOR[path.stem]}) imports {name} from floor {FLOOR[name]} above"


def test_inference_never_pays_for_training():
    importers = [path.name for path in FILES for _, name in imports(path) if name == "train"]
    assert not importers, f"{importers} import train.py"
