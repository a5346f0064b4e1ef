"""The plugin where there is no vLLM: what it imports, what it refuses, and where it leaves vLLM alone. With vLLM:
tests/vllm."""

import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import vllm_plugin
from vllm_plugin import fixes

ROOT = Path(__file__).resolve().parents[2]


def test_it_is_found_by_its_entry_point_and_imports_nothing():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"ernie": "vllm_plugin:register"}
    program = "import sys, vllm_plugin.fixes; print(*({'torch', 'vllm', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_an_unknown_fix_is_refused(monkeypatch):
    monkeypatch.setenv("ERNIE_VLLM_FIXES", "rooter")
    with pytest.raises(ValueError, match="ERNIE_VLLM_FIXES=rooter: there is no fix 'rooter'; use all, none, or"):
        vllm_plugin.register()
    monkeypatch.setenv("ERNIE_VLLM_FIXES", "none")
    vllm_plugin.register()
    assert vllm_plugin.applied == []


def pretend(monkeypatch, *, cpu: bool, version: str) -> type:
    """A vLLM with the router alone."""

    class CPURouter:
        def _compute_routing(self):
            return "stock"

    modules = {
        "vllm": {},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: cpu)},
        "vllm.version": {"__version__": version},
        f"{fixes.LAYERS}.fused_moe.router.cpu_router": {"CPURouter": CPURouter},
    }
    for name, attributes in modules.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return CPURouter


@pytest.mark.parametrize(
    ("cpu", "version", "applied"),
    [
        (True, "0.32.0", ["router"]),
        (True, "0.32.0+cpu", ["router"]),
        (True, "0.32", ["router"]),
        (True, "0.320.1", []),
        (True, "0.33.0", []),
        (False, "0.32.0", []),
    ],
)
def test_fixes_for_the_cpu_are_for_one_version(monkeypatch, cpu, version, applied):
    monkeypatch.setattr(vllm_plugin, "applied", [])
    monkeypatch.delenv("ERNIE_VLLM_FIXES", raising=False)
    router = pretend(monkeypatch, cpu=cpu, version=version)
    stock = router._compute_routing
    vllm_plugin.register()  # what is not there cannot be mended, and is no error
    assert vllm_plugin.applied == applied and (router._compute_routing is stock) == (not applied)
    mended = router._compute_routing
    vllm_plugin.register()  # once is enough
    assert router._compute_routing is mended


def test_a_reason_is_given(monkeypatch):
    pretend(monkeypatch, cpu=True, version="0.40.0")
    assert fixes.why_not(fixes.FIXES["router"]) == "it was made for vLLM 0.32, and this is 0.40.0"
    assert "is not there" in (fixes.why_not(fixes.FIXES["delimiters"]) or "")
