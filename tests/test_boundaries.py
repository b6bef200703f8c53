"""The arrows of the house: edge_agent → {models, fleet_link} ← cloud_hub, and torch only where children run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "edge_agent": {"cloud_hub", "torch", "benchmarks", "tests"},
    "cloud_hub": {"edge_agent", "torch", "benchmarks", "tests"},
    "fleet_link": {"edge_agent", "cloud_hub", "models", "torch", "benchmarks", "tests"},
    "models": {"edge_agent", "cloud_hub", "fleet_link", "benchmarks", "tests"},
}
# Programs of their own; nothing that runs inside the daemons may import them.
TORCH_MODULES = {
    *("models.archive_card", "models.archive_training", "models.laboratory"),
    *("models.augment", "models.export", "models.fitting", "models.lowrank", "models.monai_bundle", "models.network"),
    *(
        "models.objective",
        "models.parallel",
        "models.predicting",
        "models.pretraining",
        "models.privacy",
        "models.restore",
        "models.restricted",
    ),
    "models.training",
}


def _modules(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_arrow_points_the_wrong_way(package: str) -> None:
    modules = list(_modules(package))
    assert modules
    for path in modules:
        tops = {name.split(".")[0] for name in _imports(path)}
        assert not tops & FORBIDDEN[package], path


@pytest.mark.parametrize("package", ["edge_agent", "cloud_hub"])
def test_torch_lives_in_child_processes_only(package: str) -> None:
    for path in _modules(package):
        assert not _imports(path) & TORCH_MODULES, path


def test_torch_is_imported_by_the_programs_alone() -> None:
    with_torch = {path.stem for path in _modules("models") if any(n.split(".")[0] == "torch" for n in _imports(path))}
    assert {f"models.{stem}" for stem in with_torch} <= TORCH_MODULES


def test_only_daemon_and_service_start_threads() -> None:
    starters = {
        path.relative_to(ROOT).as_posix()
        for package in ("edge_agent", "cloud_hub", "fleet_link", "models")
        for path in _modules(package)
        if "Thread(" in path.read_text("utf-8")
    }
    listener = {"edge_agent/receive.py"}  # the SCP owns its listening thread, as pynetdicom wants it
    assert starters <= {"edge_agent/daemon.py", "cloud_hub/service.py"} | listener


def test_packaging_is_no_package() -> None:
    assert not (ROOT / "packaging" / "__init__.py").exists()  # it would hide the `packaging` distribution
