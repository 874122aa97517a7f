"""What a chain of programmatic dependent launches rests on, read from the kernels' syntax trees, and its switch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tritonmind import kernels
from tritonmind.kernels import pdl

FOLDER = Path(kernels.__file__).parent
SOURCES = sorted([*FOLDER.glob("triton_*.py"), *FOLDER.glob("gluon_*.py")])
# Nothing writes these while the model runs, so that they may be read before the kernel before has ended.
CONSTANT_POINTERS = {"weight_ptr", "words_desc"}
MEMORY_CALLS = {
    "load", "store", "atomic_add", "atomic_xchg", "atomic_cas", "load_sum", "fetch_tile", "store_tile", "_fetch_words",
}  # fmt: skip


def name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def calls(node: ast.AST) -> Iterator[ast.Call]:
    return (child for child in ast.walk(node) if isinstance(child, ast.Call))


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for source in SOURCES:
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                yield f"{source.name}:{node.name}", node


KERNELS = {name: node for name, node in functions() if "PDL" in {arg.arg for arg in node.args.args}}
LAUNCHES = [(name, call) for name, node in functions() for call in calls(node) if isinstance(call.func, ast.Subscript)]


def waits(statement: ast.stmt) -> bool:
    """Whether all programs, or all warps of a partition, wait here by `pdl.wait`."""
    called = {ast.unparse(call.func) for call in calls(statement)}
    return isinstance(statement, ast.Expr) and not called.isdisjoint({"wait", "pdl.wait"})


def partitions(kernel: ast.FunctionDef) -> set[str]:
    """The functions that a Gluon kernel has its warps run."""
    specialised = [call for call in calls(kernel) if name_of(call) == "warp_specialize"]
    pairs = [pair for call in specialised for pair in ast.walk(call.args[0]) if isinstance(pair, ast.Tuple)]
    return {pair.elts[0].id for pair in pairs if isinstance(pair.elts[0], ast.Name) and len(pair.elts) == 2}


def test_there_is_something_to_look_at() -> None:
    assert len(KERNELS) >= 10 and len(LAUNCHES) >= len(KERNELS)
    assert any(name.startswith("gluon_") for name in KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_waits_before_it_touches_what_others_write(name: str) -> None:
    """`wait` stands at the top level of the kernel, so that no program passes by, and before every access.

    Or of all functions that the warps of its programs run.
    """
    kernel = KERNELS[name]
    found = [index for index, statement in enumerate(kernel.body) if waits(statement)]
    if not found and (parts := partitions(kernel)):
        assert {f"{name.partition(':')[0]}:{part}" for part in parts} <= KERNELS.keys(), "a function that cannot wait"
        found = [len(kernel.body)]
    assert len(found) == 1, "one wait, outside of any branch"
    for statement in kernel.body[: found[0]]:
        assert not any(isinstance(child, ast.Return) for child in ast.walk(statement)), "ends without waiting"
        for call in calls(statement):
            if name_of(call) in MEMORY_CALLS:
                pointers = {child.id for child in ast.walk(call.args[0]) if isinstance(child, ast.Name)}
                assert pointers & CONSTANT_POINTERS, f"line {call.lineno} reads or writes before the wait"


def test_a_launch_has_the_attribute_exactly_if_its_kernel_waits() -> None:
    for name, call in LAUNCHES:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("PDL") == keywords.get("launch_pdl"), f"{name}, line {call.lineno}"


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"value": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["value"])
    card = torch.device("cuda", 0)

    def used(device: torch.device = card) -> bool:
        pdl.use_pdl.cache_clear()
        return pdl.use_pdl(device)

    monkeypatch.delenv(pdl.VARIABLE, raising=False)
    assert used() and not used(torch.device("cpu"))
    monkeypatch.setenv(pdl.VARIABLE, "0")
    assert not used()
    monkeypatch.setenv(pdl.VARIABLE, "yes")
    with pytest.raises(ValueError, match="TRITONMIND_PDL='yes' must be 0"):
        used()
    monkeypatch.setenv(pdl.VARIABLE, "1")
    capability["value"] = (8, 9)
    assert not used(), "cards before sm_90 have no such launch"
    pdl.use_pdl.cache_clear()
