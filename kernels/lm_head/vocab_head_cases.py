"""The vocabulary head's kernels at the model shapes, for the ahead-of-time compiler."""

from glm_rlhf.kernels.dispatch.launch import CompileCase
from glm_rlhf.kernels.lm_head.vocab_head import BLACKWELL, GROUP, HOPPER, PORTABLE, TileShape
from glm_rlhf.kernels.lm_head.vocab_head_kernels import _linear_logprob_bwd_kernel, _linear_logprob_fwd_kernel
from glm_rlhf.kernels.lm_head.vocab_row_kernels import _dlogits_from_exp_kernel, _merge_partials_kernel

LAUNCHED_ON = {PORTABLE: (80, 90, 100), HOPPER: (90,), BLACKWELL: (100,)}


def compile_cases() -> list[CompileCase]:
    """Return every kernel in bf16; 6B and 9B differ only in runtime arguments and share their binaries.

    Tile shapes for one generation of devices would spill on the others, where they are never launched.
    """
    cases = []
    for name, shape in (("portable", PORTABLE), ("hopper", HOPPER), ("blackwell", BLACKWELL)):
        for kernel, suffix, options in (
            (_linear_logprob_fwd_kernel, "fwd", {"STORES_EXP": False}),
            (_linear_logprob_fwd_kernel, "fwd_keep", {"STORES_EXP": True}),
            (_linear_logprob_bwd_kernel, "bwd", {"HAS_ENTROPY": True}),
        ):
            cases.append(_tile_case(f"linear_logprob_{suffix}_{name}/6B,9B/bf16", kernel, shape, options))
    integers = dict.fromkeys(("num_rows", "num_columns", "vocab_offset", "num_tiles"), "i32")
    cases.append(
        _row_case(
            "linear_loss_dlogits/6B,9B/bf16",
            _dlogits_from_exp_kernel,
            {
                "exp_ptr": "*bf16",
                "tile_maxima_ptr": "*fp32",
                "sources_ptr": "*i64",
                "targets_ptr": "*i64",
                "rows_ptr": "*fp32",
                "exp_stride": "i32",
            }
            | integers,
            {"HAS_ENTROPY": True, "TILES": 8, "BLOCK_V": 256},
        )
    )
    cases.append(
        _row_case(
            "linear_logprob_merge/6B,9B/fp32",
            _merge_partials_kernel,
            {"partials_ptr": "*fp32", "out_ptr": "*fp32"} | integers,
            {"BLOCK_S": 16, "BLOCK_T": 32},
        )
    )
    return cases


def _tile_case(name: str, kernel: object, shape: TileShape, options: dict[str, object]) -> CompileCase:
    def matrix(rows: int, columns: int) -> str:
        return f"tensordesc<bf16[{rows},{columns}]>" if shape.uses_tma else "*bf16"

    constexprs = options | {
        "USES_TMA": shape.uses_tma,
        "WIDTH_IS_EVEN": True,
        "UPCASTS": False,
        "NUM_PARTS": shape.num_parts,
        "GROUP": GROUP,
        "BLOCK_T": shape.rows,
        "BLOCK_V": shape.columns,
        "BLOCK_D": shape.width,
    }
    keeps = options.get("STORES_EXP", False)
    signature = {
        "hidden": matrix(shape.rows, shape.width),
        "weight": matrix(shape.columns, shape.width),
        "targets_ptr": "*i64",
        "partials_ptr": "*fp32",
        "rows_ptr": "*fp32",
        "exp": matrix(shape.rows, shape.columns // shape.num_parts) if keeps else "*fp32",
        "dlogits": matrix(shape.rows, shape.columns // shape.num_parts),
        "temperature": "fp32",
        "num_rows": "i32",
        "num_columns": "i32",
        "width": "i32",
        "exp_stride": "i32",
        "dlogits_stride": "i32",
        "vocab_offset": "i32",
    } | dict.fromkeys(constexprs, "constexpr")
    kernel_signature = {argument: signature[argument] for argument in kernel.arg_names}
    aligned = {"width", "exp_stride", "dlogits_stride"}
    aligned |= {argument for argument, kind in kernel_signature.items() if kind.startswith("*")}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=kernel_signature,
        constexprs={
            argument: value for argument, value in constexprs.items() if argument in kernel_signature
        },
        divisible_by_16=tuple(argument for argument in kernel_signature if argument in aligned),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        launched_on=LAUNCHED_ON[shape],
        notes="any device, any alignment" if shape is PORTABLE else "",
    )


def _row_case(
    name: str, kernel: object, signature: dict[str, str], constexprs: dict[str, object]
) -> CompileCase:
    signature = signature | dict.fromkeys(constexprs, "constexpr")
    kernel_signature = {argument: signature[argument] for argument in kernel.arg_names}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=kernel_signature,
        constexprs=constexprs,
        divisible_by_16=tuple(
            argument for argument, kind in kernel_signature.items() if kind.startswith("*")
        ),
        num_warps=4,
    )
