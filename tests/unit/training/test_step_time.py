"""Where the time of a step goes, by traces whose answer is known."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.run.step_time import MEANINGS
from finetune.training.step_time import STEP, per_step, read

UPDATE = "Optimizer.step#AdamW.step"
FLASH = "void flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>"
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"


def event(cat: str, name: str, began: float, took: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": began, "dur": took, "tid": tid, "args": args}


def kernel(name: str, began: float, took: float, launched: int = 0) -> dict[str, Any]:
    return event("kernel", name, began, took, tid=7, correlation=launched)


def trace(folder: Path, *events: dict[str, Any]) -> Path:
    file = folder / "trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": [{"ph": "M", "name": "x"}, *events]}).encode()))
    return file


def milliseconds(values: dict[str, float]) -> dict[str, float]:
    return {name: round(1e6 * value, 3) for name, value in values.items() if value}


ON_GPU = (
    event("user_annotation", STEP, 0, 500),
    event("user_annotation", STEP, 500, 500),
    event("user_annotation", "waiting for data", 0, 100),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 80, 40),  # 20 of it after the wait; a copy counts first
    kernel(GEMM, 110, 90),  # 10 while the copy still runs
    kernel(FLASH, 200, 100),
    kernel(ADD, 280, 60),  # on another stream: the one that began last counts
    event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 340, 10),
    event("cuda_runtime", "cudaLaunchKernel", 600, 5, correlation=9),
    event("user_annotation", UPDATE, 590, 30),
    kernel(ADD, 700, 50, launched=9),
    kernel("quaint", 750, 50),
    kernel(GEMM, 990, 100),  # all but 10 of it after the last step
    event("cpu_op", "aten::mm", 0, 900),  # on the host: its kernels count
)


def test_each_moment_of_a_gpu_belongs_to_one_thing(tmp_path: Path) -> None:
    traced = read(trace(tmp_path, *ON_GPU))
    parts = {
        "waiting for data": 80.0,
        "host-device copies": 30.0,
        "matmul": 100.0,
        "attention": 80.0,
        "element-wise": 70.0,
        "optimiser": 50.0,
        "other": 50.0,
    }
    assert milliseconds(traced.parts) == parts | {"launch gaps": 1000 - sum(parts.values())}
    assert sum(traced.parts.values()) == pytest.approx(traced.seconds)
    assert next(iter(milliseconds(traced.names))) == ADD


def test_only_the_gaps_of_a_gpu_are_shorter_without_the_profiler(tmp_path: Path) -> None:
    traced = read(trace(tmp_path, *ON_GPU))
    parts, _ = per_step(traced, 2, 400e-6)
    assert sum(parts.values()) == pytest.approx(400e-6)
    assert parts["matmul"] == pytest.approx(50e-6)
    assert per_step(traced, 2, 100e-6)[0]["launch gaps"] == 0.0


def test_the_innermost_operation_counts_on_a_cpu(tmp_path: Path) -> None:
    file = trace(
        tmp_path,
        event("user_annotation", STEP, 0, 1000),
        event("user_annotation", "waiting for data", 0, 100),
        event("cpu_op", "aten::randn", 20, 50),  # makes the batch
        event("cpu_op", "aten::linear", 100, 200),
        event("cpu_op", "aten::addmm", 120, 150),
        event("cpu_op", "aten::_scaled_dot_product_flash_attention_for_cpu", 300, 100),
        event("cpu_op", "autograd::engine::evaluate_function: AddmmBackward0", 400, 200),
        event("cpu_op", "aten::mul_", 420, 100),
        event("user_annotation", UPDATE, 700, 100),
        event("cpu_op", "aten::_fused_adamw_", 710, 80),
        event("cpu_op", "aten::mm", 0, 1000, tid=2),  # another thread
    )
    traced = read(file)
    assert milliseconds(traced.parts) == {
        "waiting for data": 100.0,
        "between operations": 300.0,
        "attention": 100.0,
        "matmul": 200.0,
        "element-wise": 100.0,
        "optimiser": 100.0,
        "other": 100.0,
    }
    assert "host-device copies" not in traced.parts
    parts, names = per_step(traced, 1, 500e-6)
    assert parts["matmul"] == pytest.approx(100e-6)
    assert names["aten::addmm"] == pytest.approx(75e-6)
    assert list(parts) == [part for part in MEANINGS if part in parts]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("sm80_xmma_fprop_implicit_gemm_bf16f32", "matmul"),
        ("triton_poi_fused_convert_element_type_0", "element-wise"),
        ("void cunn_SoftMaxForward<8, float, float>", "element-wise"),
        ("kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "element-wise"),
        ("_rms_norm_backward", "element-wise"),
        ("_swiglu", "element-wise"),
    ],
)
def test_kernels_are_known_by_their_names(tmp_path: Path, name: str, part: str) -> None:
    traced = read(trace(tmp_path, event("user_annotation", STEP, 0, 10), kernel(name, 0, 10)))
    assert milliseconds(traced.parts) == {part: 10.0}


def test_a_trace_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no step"):
        read(trace(tmp_path, kernel(GEMM, 0, 1)))
