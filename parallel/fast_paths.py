"""The optional accelerations that this process can use, found by importing the symbols that are called."""

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from glm_rlhf.parallel.model.varlen_attention import implementation_name

_NO_CUDA = "needs a CUDA device, this process sees none"
_ATTENTION = {
    "transformer_engine": "Transformer Engine attention",
    "torch_varlen": "torch variable-length attention",
    "scaled_dot_product": "torch scaled-dot-product attention, sequence by sequence",
}
_BUILD_APEX = " (NVIDIA's is built from source: the package index's apex is another project)"


@dataclass(frozen=True, slots=True, kw_only=True)
class FastPath:
    """One optional acceleration in this process."""

    purpose: str
    """What it accelerates: attention, Adam, gradient clipping, fused kernels, collectives."""
    name: str
    """Name for users."""
    is_active: bool
    """Whether this process uses it."""
    reason: str
    """Why it is active or not."""
    used_instead: str
    """The implementation used when it is not active; empty when it is."""


def probe() -> tuple[FastPath, ...]:
    """Return every optional acceleration, those of one purpose in order of preference.

    Each is probed by the symbol that is called, and is active only if the code that selects (our attention,
    Megatron-core's optimizer, the kernels' launcher) has selected it.
    """
    return (*_attention(), *_optimizer(), _kernels(), _collectives())


def _attention() -> list[FastPath]:
    chosen = implementation_name("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    instead = _ATTENTION.get(chosen, chosen)
    candidates = {
        "transformer_engine": _find("transformer_engine.pytorch", "DotProductAttention"),
        "torch_varlen": _find("torch.nn.attention.varlen", "varlen_attn"),
    }
    paths = [
        _path("attention", _ATTENTION[name], symbol, reason, is_chosen=chosen == name, instead=instead)
        for name, (symbol, reason) in candidates.items()
    ]
    symbol, reason = _find("flash_attn", "flash_attn_varlen_func")
    if symbol is not None:
        reason = "installed but not called: torch's variable-length attention holds the same kernels"
    paths.append(
        FastPath(
            purpose="attention",
            name="flash-attn package",
            is_active=False,
            reason=reason,
            used_instead=instead,
        )
    )
    return paths


def _optimizer() -> list[FastPath]:
    te_optimizers, apex = "transformer_engine.pytorch.optimizers", "apex.multi_tensor_apply"
    adam, adam_instead = _megatron_symbol("megatron.core.optimizer", "Adam")
    scale, scale_instead = _megatron_symbol("megatron.core.optimizer.clip_grads", "multi_tensor_scale_impl")
    candidates = [
        ("Adam", "Transformer Engine FusedAdam", _find(te_optimizers, "FusedAdam"), adam, adam_instead),
        ("Adam", "apex FusedAdam", _find("apex.optimizers", "FusedAdam"), adam, adam_instead),
        (
            "gradient clipping",
            "Transformer Engine multi-tensor clipping",
            _find(te_optimizers, "multi_tensor_scale"),
            scale,
            scale_instead,
        ),
        (
            "gradient clipping",
            "apex multi-tensor clipping",
            _find("amp_C", "multi_tensor_scale", needs=(apex, "multi_tensor_applier")),
            scale,
            scale_instead,
        ),
    ]
    return [
        _path(purpose, name, symbol, reason, is_chosen=symbol is chosen, instead=instead)
        for purpose, name, (symbol, reason), chosen, instead in candidates
    ]


def _kernels() -> FastPath:
    reference = "the fp32 torch reference"
    try:
        launch = importlib.import_module("glm_rlhf.kernels.dispatch.launch")
    except ImportError as error:
        return _kernel_path(f"Triton does not import: {_first_line(error)}", reference)
    choice = launch.requested()
    variable = f"{launch.ENVIRONMENT_VARIABLE}={choice}"
    if choice == "reference":
        return _kernel_path(f"{variable} selects the reference", reference)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return _kernel_path(f"compiled for sm_{major}{minor}", "")
    if choice == "auto":
        return _kernel_path(_NO_CUDA, reference)
    if launch.is_interpreting():
        return _kernel_path(_NO_CUDA, f"Triton's interpreter ({variable}), slow, for tests")
    return _kernel_path(
        f"{_NO_CUDA}, and {variable} needs TRITON_INTERPRET=1 there", "nothing: every kernel raises"
    )


def _collectives() -> FastPath:
    if not dist.is_nccl_available():
        reason = "this torch is built without NCCL"
    else:
        reason = "CUDA device present" if torch.cuda.is_available() else _NO_CUDA
    is_active = dist.is_nccl_available() and torch.cuda.is_available()
    return FastPath(
        purpose="collectives",
        name="NCCL",
        is_active=is_active,
        reason=reason,
        used_instead="" if is_active else "gloo",
    )


def _kernel_path(reason: str, instead: str) -> FastPath:
    return FastPath(
        purpose="fused kernels",
        name="Triton kernels",
        is_active=not instead,
        reason=reason,
        used_instead=instead,
    )


def _path(
    purpose: str, name: str, symbol: object | None, reason: str, *, is_chosen: bool, instead: str
) -> FastPath:
    is_active = symbol is not None and is_chosen and torch.cuda.is_available()
    if symbol is not None and not is_active:
        reason = "installed, not chosen" if torch.cuda.is_available() else _NO_CUDA
    return FastPath(
        purpose=purpose,
        name=name,
        is_active=is_active,
        reason=reason,
        used_instead="" if is_active else instead,
    )


def _find(module: str, name: str, *, needs: tuple[str, str] | None = None) -> tuple[Any | None, str]:
    """Return `module.name` and its dotted path, or None and the reason why it cannot be used.

    Args:
        module: dotted path of the module.
        name: the symbol in it.
        needs: another module and symbol that this one requires.
    """
    if needs is not None:
        needed, reason = _find(*needs)
        if needed is None:
            return None, reason
    package = module.partition(".")[0]
    hint = _BUILD_APEX if module == "apex.optimizers" else ""
    try:
        symbol = getattr(_import(module), name, None)
    except ModuleNotFoundError as error:
        if error.name == package:
            return None, f"{package} is not installed{hint}"
        missing = error.name or _first_line(error)
        return None, f"{package} is installed, but there is no module {missing}{hint}"
    except Exception as error:  # a broken build may raise anything
        return None, f"{module} is installed but does not import: {_first_line(error)}"
    if symbol is None:
        return None, f"{module} is installed but has no {name}{hint}"
    return symbol, f"{module}.{name}"


def _megatron_symbol(module: str, name: str) -> tuple[Any | None, str]:
    """Return the symbol that Megatron-core has selected, and a description of it."""
    try:
        symbol = getattr(_import(module), name)
    except Exception as error:  # a broken optional package may raise anything here
        return None, f"nothing: {module} does not import: {_first_line(error)}"
    owner = getattr(symbol, "__module__", None) or module
    return symbol, f"{owner.partition('.')[0]}'s {getattr(symbol, '__name__', name)}"


def _import(module: str) -> Any:
    with warnings.catch_warnings():  # the report states what is missing, once
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
