"""The warp-specialised kernels as compiled for an H100, all that is known of them; and who gets them."""

import contextlib
import importlib.util
import io
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from llm_knowledge.errors import InputError
from trainer.config.model import MetaConfig
from trainer.ops import choose_strategy, meta_linear, warp_specialised
from trainer.run.inputs import check_strategy

has_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
WIDTHS = (128, 256, 512)
KERNELS = ("forward", "backward_input")
SHARED_MEMORY = 227 * 1024  # bytes that a block may have


class Built(NamedTuple):
    registers: int
    stack: int
    warnings: list[str]  # of the assembler, that it serialises products: C75xx
    shared: int
    ptx: str
    machine_code: str


@cache
def built(kernel: str, width: int) -> Built:
    """The kernel for i = o = width, tanh the activation, which takes the most instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from tests.trainer.ops.ahead_of_time import disassembled
    from trainer.ops.experimental import warp_specialised as warp_specialised_kernels
    from trainer.ops.triton_tiles import ACTIVATION_CODES

    function = getattr(warp_specialised_kernels, f"specialised_{kernel}")
    names, ring = function.arg_names, warp_specialised.ring_of(kernel, width)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    block = (ring.columns, 64) if kernel == "forward" else (64, ring.columns)
    types = dict.fromkeys(("gates", "dg"), "*fp32")
    types |= dict.fromkeys(("h", "dh", "bias", "y"), "*bf16")
    types |= dict.fromkeys(("h_desc", "dz_desc"), f"tensordesc<bf16[64, 64],{layout!r}>")
    types["slices_desc"] = f"tensordesc<bf16[{block[0]}, {block[1]}],{layout!r}>"
    values = warp_specialised._constants(ring, width) | {"ACTIVATION": ACTIVATION_CODES["tanh"]}
    values = {name: value for name, value in values.items() if name in names}
    aligned = {"gates", "dg", "h", "dh", "bias", "y", "IN", "OUT", "STRIDE"}
    source = GluonASTSource(
        function,
        {name: "constexpr" if name in values else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in values.items()},
        {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in aligned},
    )
    log = io.StringIO()
    with (
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(log),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        machine_code = disassembled(made.asm["cubin"], Path(folder))
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    stack = re.search(r"(\d+) bytes stack frame", log.getvalue())
    assert registers, log.getvalue()
    assert stack, log.getvalue()
    warnings = re.findall(r"\bC75\d\d\b", log.getvalue())
    figures = int(registers[1]), int(stack[1]), warnings, made.metadata.shared
    return Built(*figures, made.asm["ptx"], machine_code)


@has_triton
@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_compiles_for_hopper(kernel: str, width: int) -> None:
    made, ring = built(kernel, width), warp_specialised.ring_of(kernel, width)
    assert made.registers <= 168  # of three warpgroups, which then trade them
    assert made.stack == 0, "registers spill to memory"
    assert made.warnings == [], "the assembler serialises products"
    assert made.shared <= SHARED_MEMORY
    assert ring.cells >= 4
    # Two consumers, each with four products of 16 to a block of 64.
    assert len(re.findall(r"\bHGMMA\.", made.machine_code)) == 2 * 4 * width // 64
    assert "UTMALDG" in made.machine_code
    assert "USETMAXREG" in made.machine_code
    assert "cp.async.cg" not in made.ptx  # nothing is copied but by TMA
    given = {int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", made.ptx)}
    assert {240, 24} <= given  # of a consumer and of the producer
    assert not re.search(r"\b(atom|red)\.(global|relaxed|acq)", made.ptx)


@has_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cell_is_given_back_when_all_warps_of_a_consumer_are_through(kernel: str) -> None:
    """One thread arrives for four warps: a barrier of these has to lie between it and the products."""
    lines = [line.strip() for line in built(kernel, 128).ptx.splitlines()]
    waits = [at for at, line in enumerate(lines) if line.startswith("wgmma.wait_group")]
    arrivals = [at for at, line in enumerate(lines) if "mbarrier.arrive.shared" in line]
    assert len(waits) == 2
    assert len(arrivals) == 4  # two steps of two consumers
    for arrival in arrivals:
        wait = max(at for at in waits if at < arrival)
        assert any(re.match(r"bar(rier)?\.sync\s+\d+, 128", line) for line in lines[wait:arrival])


def test_auto_never_takes_it() -> None:
    for width in WIDTHS:
        for device in ("cpu", "cuda"):
            chosen, _ = choose_strategy(
                16_384, 32, width, width, device=device, dtype=torch.bfloat16
            )
            assert chosen != "warp_specialised"


def test_a_cpu_is_refused() -> None:
    h, g, weight, bias = (torch.zeros(*n) for n in ((4, 64), (4, 2), (3, 64, 64), (3, 64)))
    missing = "CUDA" if importlib.util.find_spec("triton") else "the package triton"
    with pytest.raises(ValueError, match=f"warp_specialised needs {missing}; use auto"):
        meta_linear(h, g, weight, bias, strategy="warp_specialised")
    with pytest.raises(InputError, match=r"model\.meta\.strategy: warp_specialised needs"):
        check_strategy(
            MetaConfig(enabled=True, kind="low_rank", strategy="warp_specialised"), "cpu"
        )


def test_diagonals_are_refused_when_a_configuration_is_read() -> None:
    with pytest.raises(ValueError, match="warp_specialised has no diagonals"):
        MetaConfig(kind="gate", strategy="warp_specialised")


@has_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "words"),
    [
        ((8, 0), torch.bfloat16, (3, 64, 64), "compute capability 9.0"),
        ((9, 0), torch.float32, (3, 64, 64), "bfloat16"),
        ((9, 0), torch.bfloat16, (3, 64), "full slices"),
        ((9, 0), torch.bfloat16, (3, 64, 513), "at most 512, not 513"),
        ((9, 0), torch.bfloat16, (3, 512, 64), None),
    ],
)
def test_layers_it_was_not_written_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability, dtype, shape, words
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with FakeTensorMode():
        h = torch.empty(8, 64, device="cuda", dtype=dtype)
        weight = torch.empty(*shape, device="cuda", dtype=dtype)
    if words is None:
        warp_specialised.refuse(h, weight)
        return
    with pytest.raises(ValueError, match=words):
        warp_specialised.refuse(h, weight)


class Emulated:
    """Stands in for a kernel: what its docstring says, from the whole matrices that TMA would read."""

    def __init__(self, kernel: str) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]):
        self.grids.append(grid)
        return self._forward if self.kernel == "forward" else self._backward

    @staticmethod
    def _slices(described, rank: int) -> torch.Tensor:
        matrix = described.base.float()
        return matrix.view(rank + 1, -1, matrix.shape[1])

    def _forward(self, h, slices, gates, bias, y, rows, rank, out, stride, ACTIVATION, **sizes):
        assert h.base.shape[1] == sizes["STEPS"] * sizes["BK"]
        assert gates.shape[1] == stride
        weight = self._slices(slices, rank)
        u = torch.einsum("bi,roi->bro", h.base.float(), weight) + bias.float()
        z = torch.einsum("rb,bro->bo", gates[:, :rows], u)
        y.copy_(torch.tanh(z) if ACTIVATION == 4 else z)
        assert y.shape == (rows, out)

    def _backward(self, dz, slices, gates, h, dh, dg, rows, rank, i, o, stride, **sizes):
        assert (dz.base.shape[1], h.shape[1]) == (sizes["STEPS"] * sizes["BK"], i)
        assert o == dz.base.shape[1]
        assert gates.shape[1] == stride
        v = torch.einsum("bo,roi->bri", dz.base.float(), self._slices(slices, rank))
        dh.copy_(torch.einsum("rb,bri->bi", gates[:, :rows], v))
        columns = sizes["BN"]
        for tile in range(len(dg)):
            part = slice(tile * columns, (tile + 1) * columns)
            dg[tile] = torch.einsum("bri,bi->rb", v[..., part], h[:, part].float())


@has_triton
@pytest.mark.parametrize(("i", "o"), [(64, 64), (72, 200), (200, 72), (64, 320)])
def test_what_is_launched_and_made_of_it(monkeypatch: pytest.MonkeyPatch, i: int, o: int) -> None:
    """Widths filled up, planes added, cut off: all but the kernels themselves."""
    from trainer.ops import triton_meta
    from trainer.ops.experimental import warp_specialised as kernels

    def backward_weight(dz, h, gates, weight):
        rows = len(h)
        return torch.einsum("rb,bo,bi->roi", gates[:, :rows], dz.float(), h.float()).bfloat16()

    emulated = {kernel: Emulated(kernel) for kernel in KERNELS}
    for kernel in KERNELS:
        monkeypatch.setattr(kernels, f"specialised_{kernel}", emulated[kernel])
    monkeypatch.setattr(warp_specialised, "missing_for_warp_specialised", lambda device: None)
    monkeypatch.setattr(triton_meta, "launch_backward_weight", backward_weight)
    torch.manual_seed(i)
    sizes = ((130, i), (130, 3), (4, o, i), (4, o))
    tensors = [(torch.randn(*n) * i**-0.25).bfloat16().requires_grad_() for n in sizes]
    dy = torch.randn(130, o).bfloat16()
    results = []
    for strategy in ("warp_specialised", "reference"):
        y = meta_linear(*tensors, activation="tanh", strategy=strategy)
        results.append([y, *torch.autograd.grad(y, tensors, dy)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert (mine - theirs).float().norm() < 2e-2 * theirs.float().norm()
    assert emulated["forward"].grids == [(2, -(-(o + -o % 64) // 128))]
