"""The Triton kernels against the materialised oracle, under Triton's interpreter: no GPU is needed.

The interpreter has to be switched on before triton is imported, hence a process of its own:
`TRITON_INTERPRET=1 python -m tests.trainer.ops.test_triton_meta` prints what the tests look at.
"""

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from tests.helpers.paths import ROOT
from trainer.ops import meta_core, meta_gate, meta_linear
from trainer.ops.grouped import can_group_on_device

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# Rows, rank, in (None: the slices are diagonals), out, activation. Ragged in every dimension; each line
# takes another branch or tile.
CASES: dict[str, tuple[int, int, int | None, int, str]] = {
    "small": (37, 5, 24, 20, "relu"),
    "one_of_everything": (1, 1, 1, 1, "none"),
    "second_tile_of_columns": (70, 3, 60, 100, "leaky_relu"),
    "rank_beyond_a_block": (33, 40, 16, 33, "tanh"),
    "depth_of_128": (65, 3, 128, 96, "sigmoid"),
    "depth_loop": (20, 3, 264, 136, "leaky_relu"),
    "depth_loop_of_outputs": (20, 3, 136, 264, "relu"),
    "several_shares": (1100, 2, 20, 12, "relu"),
    "diagonal": (37, 5, None, 20, "relu"),
    "diagonal_of_one": (1, 1, None, 1, "none"),
    "diagonal_second_tile": (70, 15, None, 130, "leaky_relu"),
    "diagonal_rank_beyond_a_block": (33, 40, None, 33, "tanh"),
    "diagonal_several_shares": (1100, 2, None, 20, "sigmoid"),
}
# Relative Frobenius error. float32: rounding of sums of up to 1100 terms, 2^-24 each. bfloat16: the
# interpreter cuts the result off after 8 bits, 2^-8 on average, and g dz, whose products dW sums, too.
TOLERANCE = {"float32": 1e-6, "bfloat16": 8e-3}
# Derivatives as functions of the output. They are taken at the kernel's own rounded y, as the op does:
# 1 - y^2 of a y near 1 in bfloat16 has few bits left, for PyTorch's own tanh just the same.
SLOPES = {
    "none": torch.ones_like,
    "relu": lambda y: (y > 0).double(),
    "leaky_relu": lambda y: torch.where(y > 0, 1.0, 0.01).double(),
    "sigmoid": lambda y: y * (1 - y),
    "tanh": lambda y: 1 - y**2,
}
NAMES = ("y", "dh", "dg", "dweight", "dbias")


def inputs_of(case: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    rows, rank, i, o, _ = CASES[case]
    torch.manual_seed(rows + (i or o))
    slices = (rank + 1, o) if i is None else (rank + 1, o, i)
    shapes = [(rows, i or o), (rows, rank), slices, (rank + 1, o), (rows, o)]
    scales = [1.0, 1.0, ((i or 1) * rank) ** -0.5, 1.0, 1.0]
    return [
        (torch.randn(*shape) * scale).to(device, dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def run(call: Any, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [one.detach().clone().requires_grad_() for one in tensors]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def oracle(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight = torch.diag_embed(weight) if weight.dim() == 2 else weight
    generated = weight[-1] + torch.einsum("br,roi->boi", g, weight[:-1])
    return torch.einsum("boi,bi->bo", generated, h) + bias[-1] + g @ bias[:-1]


def errors_of(case: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Relative error of y and of every gradient; the oracle computes in float64."""
    activation = CASES[case][-1]
    *tensors, dy = inputs_of(case, dtype, device)
    ours = run(lambda *a: meta_linear(*a, activation=activation, strategy="fused"), tensors, dy)
    # The interpreter runs programs in order: one sum of several shares says all that it can say.
    if device == "cuda" or (case.endswith("several_shares") and dtype == torch.float32):
        again = run(
            lambda *a: meta_linear(*a, activation=activation, strategy="fused"), tensors, dy
        )
        assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))
    assert all(one.dtype == dtype and one.is_contiguous() for one in ours)
    function = (lambda z: z) if activation == "none" else getattr(torch.nn.functional, activation)
    leaves = [one.double().requires_grad_() for one in tensors]
    z = oracle(*leaves)
    slope = SLOPES[activation](ours[0].double())
    theirs = [function(z).detach(), *torch.autograd.grad(z, leaves, dy.double() * slope)]
    return {
        name: ((one.double() - other).norm() / other.norm().clamp(min=1e-30)).item()
        for name, one, other in zip(NAMES, ours, theirs, strict=True)
    }


def facts_of(case: str) -> dict[str, Any]:
    """Empty batches, strides, offsets, autocast, shared knowledge: everything but numbers."""
    h, g, weight, bias, dy = inputs_of(case, torch.float32)
    empty = run(
        lambda *a: meta_linear(*a, strategy="fused", activation="relu"),
        [h[:0], g[:0], weight, bias],
        dy[:0],
    )
    expected = run(oracle, [h, g, weight, bias], dy)
    twisted = [one.transpose(0, 1).contiguous().transpose(0, 1) for one in (h, g, weight, bias)]
    strided = run(lambda *a: meta_linear(*a, strategy="fused"), twisted, dy.t().contiguous().t())
    shifted = [torch.cat([one.flatten()[:1], one.flatten()])[1:].view_as(one) for one in twisted]
    offset = run(lambda *a: meta_linear(*a, strategy="fused"), shifted, dy)
    with torch.autocast("cpu", torch.bfloat16):
        cast = meta_linear(h, g, weight, bias, strategy="fused").dtype
    group = torch.arange(len(h)) % 3
    shared = meta_linear(h, g[:3], weight, bias, group=group, strategy="fused")
    fused, fused_backward_op = (
        getattr(torch.ops.llm4msr, f"meta_linear_fused{end}").default for end in ("", "_backward")
    )
    leaves = [one.clone().requires_grad_() for one in (h, g, weight, bias)]
    y = meta_linear(h, g, weight, bias, strategy="fused", activation="tanh")
    checks = opcheck(fused, (*leaves, "tanh")).values()
    checks_backward = opcheck(fused_backward_op, (dy, y, h, g, weight, bias, "tanh")).values()
    for rows in (len(h), 0):  # as strides and sizes say, whatever layout the inputs have
        inputs = [one[:rows] for one in (dy, y, *twisted[:2])] + twisted[2:]
        seen = opcheck(fused_backward_op, (*inputs, "tanh"), test_utils=("test_faketensor",))
        checks_backward = [*checks_backward, *seen.values()]
    return {
        "empty": [[list(one.shape) for one in empty], [one.abs().sum().item() for one in empty]],
        "strided": [
            torch.allclose(a, b, atol=1e-4) for a, b in zip(strided, expected, strict=True)
        ],
        "offset": [torch.allclose(a, b, atol=1e-4) for a, b in zip(offset, expected, strict=True)],
        "autocast": str(cast),
        "shared": torch.allclose(shared, oracle(h, g[:3][group], weight, bias), atol=1e-4),
        "opcheck": sorted({*checks, *checks_backward}),
        "compiled": compiled_equals_eager(case),
        "edges": edges(case),
    }


def largest(diagonal: bool) -> int:
    """Bytes of the largest tensor that the launchers make of B=300, r=8, i=o=32."""
    from tests.trainer.ops.test_meta_linear import LargestTensor
    from trainer.ops import triton_diagonal, triton_meta

    kernels = triton_diagonal if diagonal else triton_meta
    h, g, bias = torch.randn(300, 32), torch.randn(300, 8), torch.randn(9, 32)
    weight = torch.randn(9, 32) if diagonal else torch.randn(9, 32, 32)
    with LargestTensor() as seen:
        y = kernels.fused_forward(h, g, weight, bias, "none")
        kernels.fused_backward(torch.ones_like(y), h, g, weight, bias)
    return seen.bytes


def infinite_gradient(width: int) -> bool:
    """Whether gradients of a loss that overflowed are what reference makes of them, padded or not."""
    torch.manual_seed(width)
    # All of one sign, or what is infinite would cancel to no number for reference too.
    tensors = [torch.rand(*size) for size in ((9, width), (9, 3), (4, 20, width), (4, 20))]
    dy = torch.randn(9, 20)
    dy[4, 7] = torch.inf
    pair = [
        run(lambda *a, s=strategy: meta_linear(*a, strategy=s), tensors, dy)
        for strategy in ("fused", "reference")
    ]
    assert bool(pair[1][2][4].isposinf().all())
    return all(torch.allclose(a, b, 1e-4, 1e-4, equal_nan=True) for a, b in zip(*pair, strict=True))


def error_of_cancelled_gates() -> float:
    """Relative error of dg in bfloat16 where its two parts, of weights and of biases, nearly cancel."""
    torch.manual_seed(0)
    h, g, weight, dy = (
        torch.randn(*size).bfloat16() for size in ((1, 32), (1, 4), (5, 32, 32), (1, 32))
    )
    bias = -torch.einsum("roi,i->ro", weight.float(), h[0].float()).bfloat16()
    _, _, dg, _, _ = run(lambda *a: meta_linear(*a, strategy="fused"), [h, g, weight, bias], dy)
    layers = torch.einsum("roi,i->ro", weight.double(), h[0].double()) + bias.double()
    exact = layers[:-1] @ dy[0].double()
    return ((dg[0].double() - exact).norm() / exact.norm()).item()


def gradients_inside_autocast(dtype: torch.dtype) -> list[bool]:
    """Whether gradients of a float32 layer, and of one in autocast, are the same taken inside autocast."""
    *tensors, dy = inputs_of("small", torch.float32)
    same = []
    for is_cast in (False, True):
        found = []
        for inside in (False, True):
            leaves = [one.clone().requires_grad_() for one in tensors]
            with torch.autocast("cpu", dtype, enabled=is_cast):
                y = meta_linear(*leaves, strategy="fused", activation="relu")
            with torch.autocast("cpu", dtype, enabled=inside):
                found.append(torch.autograd.grad(y, leaves, dy.to(y.dtype)))
        same.append(all(torch.equal(a, b) for a, b in zip(*found, strict=True)))
    return same


def counted_traffic() -> dict[str, list[int]]:
    """Bytes of loads and stores, within their masks, as the interpreter runs them and by the formula."""
    from triton.runtime.interpreter import interpreter_builder

    from trainer.ops import triton_meta
    from trainer.ops.traffic import traffic
    from trainer.ops.triton_tiles import transposed_gates

    moved: list[int] = []
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        moved.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)

    def counting_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(pointers, mask, *rest)

    def counting_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(pointers, value, mask, *rest)

    interpreter_builder.create_masked_load = counting_load
    interpreter_builder.create_masked_store = counting_store
    found = {}
    # Parts of slices, several shares, tiles of columns, and depths beyond a block.
    shapes = [(70, 9, 16, 80), (530, 2, 32, 16), (20, 2, 272, 16), (20, 2, 16, 272)]
    for rows, rank, i, o in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            sizes = [(rows, i), (rows, rank), (rank + 1, o, i), (rank + 1, o), (rows, o)]
            h, g, weight, bias, dz = (torch.randn(*size).to(dtype) for size in sizes)
            gates = transposed_gates(g)
            inputs = (dz, h, gates, weight)
            calls = {
                "forward": functools.partial(triton_meta.fused_forward, h, g, weight, bias, "relu"),
                "backward_input": functools.partial(
                    triton_meta.launch_backward_input, *inputs, bias, i
                ),
                "backward_weight": functools.partial(triton_meta.launch_backward_weight, *inputs),
            }
            for kernel, call in calls.items():
                moved.clear()
                call()
                formula = traffic(
                    kernel, rows, rank, i, o, itemsize=dtype.itemsize, processors=4
                ).l2
                found[f"{kernel} {rows} {i} {o} {dtype}"] = [sum(moved), formula]
    interpreter_builder.create_masked_load, interpreter_builder.create_masked_store = load, store
    return found


def facts_of_the_rest() -> dict[str, Any]:
    from benchmarks.layer_tiles import sweep, winners

    return {
        "traffic": counted_traffic(),
        "infinite": [infinite_gradient(width) for width in (20, 24, 64, 80)],
        "cancelled": error_of_cancelled_gates(),
        "autocast": [gradients_inside_autocast(one) for one in (torch.bfloat16, torch.float16)],
        "largest": [largest(diagonal) for diagonal in (False, True)],
        "sweep": winners(sweep((33, 2, 16, 16), 2, "cpu", torch.float32, most=2)),
    }


def edges(case: str) -> dict[str, bool]:
    """Widths of 0, values that are no numbers or tiny, settings of the user's: what holds."""
    h, g, weight, bias, dy = inputs_of(case, torch.float32)
    found: dict[str, bool] = {}
    widths = (
        {"no inputs": (0, 20), "no outputs": (24, 0)} if weight.dim() == 3 else {"none": (0, 0)}
    )
    for name, (i, o) in widths.items():
        cut = [h[:, :i], g, weight[:, :o, :i] if i != o else weight[:, :o], bias[:, :o]]
        pair = [
            run(lambda *a, s=strategy: meta_linear(*a, strategy=s), cut, dy[:, :o])
            for strategy in ("fused", "reference")
        ]
        found[name] = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*pair, strict=True))
    infinite = [h[:0], g[:0], weight / 0, bias]
    empty = run(lambda *a: meta_linear(*a, strategy="fused"), infinite, dy[:0])
    found["empty, infinite weights"] = all(bool((one == 0).all()) for one in empty)
    broken = h.clone()
    broken[3, 2] = torch.nan
    for activation in SLOPES:
        y = meta_linear(broken, g, weight, bias, activation=activation, strategy="fused")
        missing = y.isnan()
        reached = missing[3].all() if weight.dim() == 3 else missing[3, 2]
        expected = 20 if weight.dim() == 3 else 1
        found[f"nan through {activation}"] = bool(reached) and int(missing.sum()) == expected
    for scale in (1e-6, 1e-3, 0.3, 1.0):
        scaled = [h, g, weight * scale, bias * scale]
        y = meta_linear(*scaled, activation="tanh", strategy="fused").double()
        exact = torch.tanh(oracle(*[one.double() for one in scaled]))
        found[f"tanh of {scale}"] = bool(((y - exact).norm() / exact.norm()) < 1e-6)
    was = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    y = meta_linear(h, g, weight, bias, strategy="fused")
    torch.backends.cuda.matmul.fp32_precision = was
    found["precision by its newer name"] = torch.equal(
        y, meta_linear(h, g, weight, bias, strategy="fused")
    )
    return found


def compiled_equals_eager(case: str) -> dict[str, Any]:
    """Output and gradients bit by bit at two batch sizes, and how often that was compiled."""
    call = functools.partial(meta_linear, strategy="fused", activation="relu")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    *tensors, dy = inputs_of(case, torch.float32)
    h, g, weight, bias = tensors
    same = []
    for rows in (len(h), 21):
        cut, cut_dy = [h[:rows], g[:rows], weight, bias], dy[:rows]
        pairs = zip(run(compiled, cut, cut_dy), run(call, cut, cut_dy), strict=True)
        same += [torch.equal(one, other) for one, other in pairs]
    return {"same": same, "frames": counter.frame_count}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.ops.test_triton_meta"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_oracle(interpreted: dict[str, Any], case: str, dtype: str) -> None:
    errors = interpreted["errors"][f"{case} {dtype}"]
    assert set(errors) == set(NAMES)
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "i", "slices"), [("full", 24, [6, 20, 24]), ("diagonal", 20, [6, 20])]
)
def test_empty_batch(interpreted: dict[str, Any], form: str, i: int, slices: list[int]) -> None:
    shapes, sums = interpreted[form]["empty"]
    assert shapes == [[0, 20], [0, i], [0, 5], slices, [6, 20]]
    assert sums == [0] * 5


@pytest.mark.slow
@pytest.mark.parametrize(("form", "number"), [("full", 13), ("diagonal", 12)])
def test_edges(interpreted: dict[str, Any], form: str, number: int) -> None:
    found = interpreted[form]["edges"]
    assert len(found) == number
    assert [name for name, holds in found.items() if not holds] == []


def test_float32_is_multiplied_as_the_user_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.ops.triton_tiles import precision_of

    # Not through torch: the two names of the setting must not be mixed in one process.
    matmul = SimpleNamespace(fp32_precision="none")
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert precision_of(torch.float32) == "tf32x3"
    matmul.fp32_precision = "tf32"
    assert precision_of(torch.float32) == precision_of(torch.bfloat16) == "tf32"


@pytest.mark.parametrize(
    ("programs", "rows", "widest"),
    [(4, 1000, 64), (500, 100_000, 512), (528, 4_194_305, 512), (9, 2**31, 128)],
)
def test_shares_of_the_batch_are_numbered_by_32_bits(programs: int, rows: int, widest: int) -> None:
    from trainer.ops.triton_tiles import share_of_batch

    share = share_of_batch(132, programs, rows, widest, 64)
    assert share % 64 == 0
    assert share * widest <= 2**31
    assert share >= min(320, rows)  # of few rows no more parts than one per 512


@pytest.mark.parametrize(
    ("programs", "most", "expected"),
    [
        (16, 8, 7),  # B = 1,024, 128 to 128, r = 32: 112 programs of 264 that fit
        (64, 8, 4),  # B = 4,096: 256 at once; with five parts, 56 of 320 would run alone
        (256, 8, 1),  # B = 16,384
        (300, 8, 3),  # 900 in four rounds of a third each, 1.33 in place of 2
        (1, 1, 1),
        (264, 100, 1),
    ],
)
def test_small_grids_are_split_until_the_last_round_is_full(
    programs: int, most: int, expected: int
) -> None:
    from trainer.ops.triton_tiles import slices_of_a_part, ways_to_split

    assert ways_to_split(132, programs, most) == expected
    if most == 8:
        assert slices_of_a_part(132, programs, 33) == -(-33 // expected)


def test_the_interpreter_goes_through_parts_of_the_slices() -> None:
    """What the case with the highest rank is there for: seven parts of six slices, the last of five."""
    from trainer.ops.triton_tiles import multiprocessors, slices_of_a_part

    rows, rank, *_ = CASES["rank_beyond_a_block"]
    assert rows <= 64  # one program without a split
    assert slices_of_a_part(multiprocessors(torch.device("cpu")), 1, rank + 1) == 6


@pytest.mark.slow
@pytest.mark.parametrize("how", ["strided", "offset"])
@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_any_layout_in_memory(interpreted: dict[str, Any], form: str, how: str) -> None:
    assert interpreted[form][how] == [True] * 5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_autocast_shared_knowledge_compile_and_opcheck(
    interpreted: dict[str, Any], form: str
) -> None:
    rest = interpreted[form]
    assert rest["autocast"] == "torch.bfloat16"
    assert rest["shared"]
    assert rest["compiled"] == {"same": [True] * 10, "frames": 1}
    assert rest["opcheck"] == ["SUCCESS"]


@pytest.mark.slow
def test_traffic_by_formula_is_what_the_kernels_load_and_store(interpreted: dict[str, Any]) -> None:
    counts = interpreted["rest"]["traffic"]
    assert len(counts) == 24
    assert {name: pair for name, pair in counts.items() if pair[0] != pair[1]} == {}


def test_traffic_by_hand() -> None:
    """B = 16,384, r = 32, 128 to 128: 128 x 2 programs of 128 rows and 64 columns."""
    from trainer.ops.traffic import traffic

    found = traffic("forward", 16_384, 32, 128, 128)
    assert found.programs == 256
    assert found.flops == 2 * 16_384 * 33 * 128 * 128
    h_and_weight = 256 * 2 * (128 * 128 + 33 * 64 * 128)
    gates_and_biases = 256 * (2 * 4 * 33 * 128 + 2 * 33 * 64)
    assert found.l2 == h_and_weight + gates_and_biases + 2 * 16_384 * 128
    arrays = 2 * (2 * 16_384 * 128 + 33 * 128 * 129) + 4 * 33 * 16_384
    assert found.memory == arrays
    assert found.bound() == pytest.approx(found.flops_per_l2_byte * 5.5e12 / 989e12)


def test_the_page_has_the_bytes_and_bounds_of_the_formula() -> None:
    """Every cell of its table: r = 32, bfloat16, 132 multiprocessors, an H200's memory."""
    from trainer.ops.traffic import traffic

    page = (ROOT / "docs" / "results" / "meta-layer.md").read_text(encoding="utf-8").splitlines()
    head = next(at for at, line in enumerate(page) if line.startswith("| i = o | B |"))
    for line, (width, rows) in zip(
        page[head + 2 :],
        itertools.product((128, 256, 512), (1024, 4096, 16_384, 65_536)),
        strict=False,
    ):
        cells = [f"{width}", f"{rows:,}"]
        for kernel in ("forward", "backward_input", "backward_weight"):
            moved = traffic(kernel, rows, 32, width, width)
            cells.append(
                f"{moved.programs:,}, {moved.l2 / 1e6:,.0f} ({moved.flops_per_l2_byte:.0f}), "
                f"{moved.memory / 1e6:,.0f}, {moved.bound():.0%}"
            )
        assert line == f"| {' | '.join(cells)} |"


@pytest.mark.slow
def test_what_is_infinite_stays_so_whatever_the_padding(interpreted: dict[str, Any]) -> None:
    assert interpreted["rest"]["infinite"] == [True] * 4


@pytest.mark.slow
def test_parts_of_a_gradient_that_cancel_meet_before_they_are_rounded(
    interpreted: dict[str, Any],
) -> None:
    """The sum is rounded once, to 8 bits; a part rounded before left an error as large as the sum."""
    assert interpreted["rest"]["cancelled"] < 8e-3


@pytest.mark.slow
def test_gradients_taken_inside_autocast_are_those_of_the_forward_pass(
    interpreted: dict[str, Any],
) -> None:
    assert interpreted["rest"]["autocast"] == [[True, True]] * 2


@pytest.mark.slow
def test_neither_generated_weights_nor_the_outer_product_are_stored(
    interpreted: dict[str, Any],
) -> None:
    # B=300, r=8, i=o=32: [B, i] is the largest; [B, r, i] would be 8 and [B, o, i] 32 times larger.
    assert interpreted["rest"]["largest"] == [4 * 300 * 32] * 2


@pytest.mark.slow
def test_sweep_prints_lines_for_the_tile_table(interpreted: dict[str, Any]) -> None:
    from benchmarks.layer_tiles import candidates
    from trainer.ops import triton_diagonal, triton_meta
    from trainer.ops.triton_tiles import TILES, Tile

    lines = interpreted["rest"]["sweep"]
    kernels = [*triton_meta.KERNELS, *triton_diagonal.KERNELS]
    for line, kernel in zip(lines, kernels, strict=True):
        entry, comment = line.split("  # ")
        found = eval(entry.strip().rstrip(","), {"Tile": Tile})
        depth = 33 if kernel.endswith("backward_weight") else 16
        known = [
            *candidates(kernel, 4, 16, depth)[:2],
            *((*one[:2], 16, *one[3:]) for one in TILES),
        ]
        assert found in known
        assert "with the table's tile" in comment


def test_without_the_interpreter_a_cpu_is_refused() -> None:
    *tensors, _ = inputs_of("small", torch.float32)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        meta_linear(*tensors, strategy="fused")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_oracle_on_cuda(case: str, dtype: torch.dtype) -> None:
    # Three TF32 products stand for one float32 product: a few bits less than the interpreter has.
    limit = 5e-6 if dtype == torch.float32 else TOLERANCE["bfloat16"]
    errors = errors_of(case, dtype, "cuda")
    assert max(errors.values()) < limit, errors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "form", ["fused", "grouped", "core", "core grouped", "gate", "gate grouped"]
)
def test_forward_and_backward_can_be_captured_in_a_graph(form: str) -> None:
    (rows, rank, width), keys = (72, 16, 64), 4
    if form in ("grouped", "core grouped") and not can_group_on_device(
        torch.bfloat16, width, width
    ):
        pytest.skip("the ends of the groups would be read back, which a graph cannot hold")
    shared = form.endswith("grouped") or form == "gate"
    shapes = [(rows, width), (keys if shared else rows, rank), (rank + 1, width, width)]
    tensors = [
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * width**-0.5
        for shape in (*shapes, (rank + 1, width), (width, width))
    ]
    dy = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    group = torch.arange(rows, device="cuda") % keys if shared else None
    strategy = "grouped" if form.endswith("grouped") else "fused"

    def call(h: Tensor, g: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
        if form.startswith("gate"):
            return meta_gate(
                h, g, factor, bias, bias + weight[:, 0], group=group, strategy=strategy
            )
        options: dict[str, Any] = {"group": group, "activation": "relu", "strategy": strategy}
        if form.startswith("core"):
            return meta_core(h, g, factor, weight, bias, factor.t(), **options)
        return meta_linear(h, g, weight, bias + factor[0], **options)

    expected = run(call, tensors, dy)  # compiles, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, tensors, dy)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


if __name__ == "__main__":
    found = {
        f"{case} {name}": errors_of(case, getattr(torch, name))
        for case in CASES
        for name in TOLERANCE
    }
    facts = {"full": facts_of("small"), "diagonal": facts_of("diagonal")}
    print(json.dumps({"errors": found, **facts, "rest": facts_of_the_rest()}))
