"""The structure of the tree: which way imports point, and what stands where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["topologies", "runtime", "algorithms", "launch"]  # each may import those before it


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_imports_upward(layer):
    above = {f"gossamer.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]}
    for path in (ROOT / layer).rglob("*.py"):
        upward = {m for m in imports(path) if any(m == a or m.startswith(a + ".") for a in above)}
        assert not upward, f"{path} imports {upward}"


def test_topologies_import_nothing_of_ours_and_no_torch():
    for path in (ROOT / "topologies").rglob("*.py"):
        for module in imports(path):
            assert not module.startswith("torch"), path
            ours = module.startswith("gossamer") and not module.startswith("gossamer.topologies")
            assert not ours, f"{path} imports {module}"


def test_the_compiled_module_is_reached_through_one_python_module():
    package = ROOT / "runtime" / "native"
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            if path != package / "compiled.py":
                assert "gossamer.runtime._C" not in imports(path), path
            if package not in path.parents:
                past_the_checks = "gossamer.runtime.native.compiled" in imports(path)
                assert not past_the_checks, f"{path}: import gossamer.runtime.native"


def test_topology_commands_do_not_wait_for_torch():
    code = "import sys, gossamer.topologies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_stub_of_the_compiled_module_is_current(tmp_path):
    stub = tmp_path / "_C.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-m", "gossamer.runtime._C", "-P"]
    subprocess.run([*command, "-o", str(stub)], check=True, capture_output=True)
    assert stub.read_text() == (ROOT / "runtime" / "_C.pyi").read_text(), (
        "run: python -m nanobind.stubgen -m gossamer.runtime._C -P -o runtime/_C.pyi"
    )
