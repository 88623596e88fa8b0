"""Whatever vLLM calls of ours takes what it passes, and what we call or read of vLLM is there.

A later vLLM with another signature fails here with its name, and not in an engine on a GPU.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.sampler import Sampler

import vllm_refusion
from vllm_refusion.backbones import ARCHITECTURES
from vllm_refusion.engine import (
    attention,
    compat,
    cpu_step,
    model,
    model_state,
    sampler,
    scheduler,
)
from vllm_refusion.engine.config_hook import ReFusionConfig

# Parameters of vLLM's that are passed by position, so that ours may have other names; that every
# caller passes, though they have a default; that nobody passes to ours.
RENAMED = {"req_index": "req", "logits": "hidden_states"}
ALWAYS = {"num_kv_heads"}
NEVER = {"layer_type"}
BY_NAME = {"_generate_with_builtin_tools"}  # takes no argument by position, see its test
RUNNER = inspect.getsource(GPUModelRunner)


def calls(signature: inspect.Signature) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Arguments that fit it: all by position, all by name, only those that must be given."""
    parameters = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in NEVER
    ]

    def named(chosen):
        return {RENAMED.get(parameter.name, parameter.name): "" for parameter in chosen}

    by_name = [parameter for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
    yield [], named(parameters)
    yield ["" for parameter in parameters if parameter not in by_name], named(by_name)
    yield [], named(p for p in parameters if p.default is p.empty or p.name in ALWAYS)


def assert_takes(ours: Any, theirs: Any, first: tuple = ()) -> None:
    """``ours``, after the arguments ``first``, can be called in every way that ``theirs`` can."""
    for args, kwargs in calls(inspect.signature(theirs)):
        if args and theirs.__name__ in BY_NAME:
            continue
        try:
            inspect.signature(ours).bind(*first, *args, **kwargs)
        except TypeError as error:
            raise AssertionError(
                f"{ours.__qualname__}{inspect.signature(ours)} is called as "
                f"{theirs.__qualname__}{inspect.signature(theirs)}: {error}"
            ) from error


def plain(function: Any) -> Any:
    return function.__func__ if isinstance(function, staticmethod | classmethod) else function


def overrides() -> dict[str, tuple[Any, Any]]:
    """Methods of our classes, each with that of vLLM which it overrides."""
    found = {}
    for module in (attention, model, model_state, scheduler):
        for ours in vars(module).values():
            if not inspect.isclass(ours) or ours.__module__ != module.__name__:
                continue
            lineage = [cls for cls in ours.__mro__ if cls.__module__.startswith("vllm_refusion")]
            stock = [cls for cls in ours.__mro__ if cls.__module__.startswith("vllm.")]
            for name, method in ((n, m) for cls in lineage for n, m in vars(cls).items()):
                base = next((vars(cls)[name] for cls in stock if name in vars(cls)), None)
                if inspect.isfunction(plain(method)) and inspect.isfunction(plain(base)):
                    found[f"{ours.__name__}.{name}"] = (plain(method), plain(base))
    return found


OVERRIDES = overrides()


@pytest.mark.parametrize("name", OVERRIDES)
def test_overridden_methods_take_what_vllm_passes(name):
    assert_takes(*OVERRIDES[name])


def test_what_is_overridden():
    assert {
        "CanvasAttentionImpl.forward",
        "CanvasAttentionMetadataBuilder.build_for_cudagraph_capture",
        "CanvasAttentionBackend.customize_spec",
        "ReFusionAsyncScheduler._update_after_schedule",
        "ReFusionModelState.prepare_attn",
        "ReFusionQwen3ForCausalLM.compute_logits",
    } <= set(OVERRIDES)
    for ours in (model_state.ReFusionModelState, attention.CanvasAttentionImpl):
        assert not inspect.isabstract(ours)
    assert not inspect.isabstract(attention.CanvasAttentionBackend)
    assert not inspect.isabstract(attention.CanvasAttentionMetadataBuilder)
    assert not inspect.isabstract(scheduler.ReFusionScheduler)


@pytest.mark.parametrize("name", ["add_request", "apply_staged_writes", "__call__"])
def test_sampler_takes_what_the_runner_passes(name):
    assert_takes(getattr(sampler.CanvasSampler, name), getattr(Sampler, name))


def test_sampler_has_what_the_runner_reads():
    of_others = {
        "compute_nans",  # with batch-sharded sampling, which is refused
        "get_logprobs_dims",
        "sampling_states",  # where a model drafts
    }
    read = set(re.findall(r"self\.sampler\.(\w+)", RUNNER))
    assert read - of_others == {"add_request", "apply_staged_writes", "penalties_state"}
    assert "self.sampler, self.rejection_sampler = custom" in RUNNER


def patches(monkeypatch) -> list[tuple[type, str, Any]]:
    """Owner, name and function of each patch; nothing is patched again."""
    found = []
    monkeypatch.setattr(
        compat, "_patch", lambda owner, name: lambda ours: found.append((owner, name, ours))
    )
    compat.install(
        compat.Hooks(
            ARCHITECTURES.values(),
            ReFusionConfig,
            route=print,
            is_ours=bool,
            extends_texts=bool,
            admit=print,
            report=print,
            take_adapter=print,
            published=str,
            cpu_step=cpu_step,
            endpoints="",
        )
    )
    compat.refuse_malformed_bodies()
    return found


def test_patches_take_what_vllm_passes(monkeypatch):
    vllm_refusion.register()
    importlib.import_module(compat._RESPONSES_PROTOCOL)
    compat.refuse_malformed_bodies()
    found = patches(monkeypatch)
    assert len(found) > 12
    for owner, name, ours in found:
        static = inspect.getattr_static(owner, name)
        patched = static.fget if isinstance(static, property) else plain(static)
        assert_takes(ours, patched.__wrapped__, first=("original",))
    source = inspect.getsource(importlib.import_module(compat._RESPONSES_PROTOCOL[:-8] + "serving"))
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", None) in BY_NAME:
            assert not call.args


def imported(tree: ast.Module) -> dict[str, Any]:
    """What a module takes from vLLM anywhere in it, by the name it has there.

    Without what is imported beside CUDA extensions only.
    """
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vllm"):
            continue
        if node.module.startswith(("vllm_refusion", "vllm.vllm_flash_attn")):
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            item = getattr(module, alias.name, None) or importlib.import_module(name)
            found[alias.asname or alias.name] = item
    return found


def modules() -> dict[str, ast.Module]:
    found = {}
    for module in pkgutil.walk_packages(vllm_refusion.__path__, "vllm_refusion."):
        if not module.name.endswith("__main__"):
            source = inspect.getsource(importlib.import_module(module.name))
            found[module.name] = ast.parse(source)
    return {name: tree for name, tree in found.items() if imported(tree)}


MODULES = modules()


def called(function: ast.expr, names: dict[str, Any]) -> Any:
    """What of vLLM a call's ``function`` names; None if it is not known."""
    if isinstance(function, ast.Name):
        return names.get(function.id)
    if isinstance(function, ast.Attribute):
        owner = called(function.value, names)
        return owner and getattr(owner, function.attr, None)
    return None


@pytest.mark.parametrize("name", MODULES)
def test_calls_of_vllm_fit(name):
    names = imported(MODULES[name])
    for node in ast.walk(MODULES[name]):
        target = called(node.func, names) if isinstance(node, ast.Call) else None
        if not callable(target) or hasattr(target, "__required_keys__"):
            continue
        some = any(isinstance(argument, ast.Starred) for argument in node.args)
        some |= any(keyword.arg is None for keyword in node.keywords)
        signature = inspect.signature(target)
        bind = signature.bind_partial if some else signature.bind
        args = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        try:
            bind(*args, **{keyword.arg: "" for keyword in node.keywords if keyword.arg})
        except TypeError as error:
            raise AssertionError(f"{ast.unparse(node)}, line {node.lineno}: {error}") from error


def has(cls: type, name: str) -> bool:
    """Whether objects of ``cls`` have it: a method, a field, or what one of its methods sets."""
    if hasattr(cls, name) or (is_dataclass(cls) and name in cls.__dataclass_fields__):
        return True
    return any(
        name in vars(base).get("__annotations__", {})
        or re.search(rf"self\.{name}\b[^=\n]* = ", inspect.getsource(base))
        for base in cls.__mro__
        if base.__module__.startswith("vllm.")
    )


OF_OURS = {"refusion_spec"}  # set by us


@pytest.mark.parametrize("name", MODULES)
def test_fields_that_are_read_are_there(name):
    """Of parameters that are annotated with a class of vLLM's."""
    classes = {key: item for key, item in imported(MODULES[name]).items() if inspect.isclass(item)}
    missing = set()
    for function in ast.walk(MODULES[name]):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = {
            argument.arg: classes[argument.annotation.id]
            for argument in [*function.args.args, *function.args.kwonlyargs]
            if isinstance(argument.annotation, ast.Name) and argument.annotation.id in classes
        }
        missing |= {
            f"{given[node.value.id].__name__}.{node.attr}"
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in given
            and node.attr not in OF_OURS
            and not has(given[node.value.id], node.attr)
        }
    assert not missing
