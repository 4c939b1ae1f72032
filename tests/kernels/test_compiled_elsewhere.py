"""What the compiler makes of decoding, loss and projector, for every GPU that ``kernels.dispatch`` sends them to."""

import pytest
import torch

from kernels import cross_entropy_rows, decode, dispatch, projector_gemm, projector_rows
from tests.kernels.ahead_of_time import SHARED_MEMORY, Compiled, compiled_by

pytestmark = pytest.mark.compiler
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPUS = sorted(SHARED_MEMORY)


def check(code: Compiled, sm: int) -> None:
    assert code.stack == 0, f"{code.stack} bytes of registers are spilled"
    assert code.shared <= SHARED_MEMORY[sm]


def test_every_gpu_of_the_table_is_compiled_for():
    """But for B300 (103): the disassembler of Triton 3.6 does not know it, and its rows and limits are those of 100."""
    others = (dispatch.CPU, dispatch.INTERPRETER, 103)
    assert {sm for sm in dispatch.ARCHITECTURES if sm not in others} == set(GPUS)


@pytest.mark.parametrize("sm", GPUS)
def test_attention_and_projector_run_in_triton_on_hopper_only(sm):
    for operation in ("attention_forward", "block_forward", "projector"):
        for head_dim in (64, 128):
            chosen = dispatch.choose(operation, sm, BF16, head_dim).implementation
            assert (chosen == "triton") == (sm == 90)


def decoded(E: int, dtype: torch.dtype, sm: int) -> list[Compiled]:
    """Both kernels, for four sequences of which two are long enough to be split."""
    q_BHE, cache_BSKE = torch.empty(4, 32, E, dtype=dtype), torch.empty(4, 4096, 8, E, dtype=dtype)
    length_B = torch.zeros(4, dtype=torch.int64)
    return compiled_by(lambda: decode.decode_attention_op(q_BHE, cache_BSKE, cache_BSKE, length_B, None, 0.1, None), sm)


@pytest.mark.parametrize("sm", GPUS)
@pytest.mark.parametrize(("E", "dtype"), [(64, BF16), (128, BF16), (80, FP16), (256, BF16), (128, FP32)], ids=str)
def test_decoding_streams_without_spills_and_fits_as_often_as_it_counts_on(E, dtype, sm):
    if sm not in (80, 90) and dtype != BF16:
        pytest.skip("the other dtypes are compiled for an A100 and an H100")
    split, merge = decoded(E, dtype, sm)
    assert merge.stack == 0 and split.stack <= 8 * (dtype == FP32 and sm == 80)  # 8 bytes with Triton 3.6
    assert max(split.shared, merge.shared) <= SHARED_MEMORY[sm]
    assert "LDGSTS.E.BYPASS.128" in split.sass  # 16 bytes at a time, past the registers
    if E <= 128 and dtype != FP32:
        programs = decode.PROGRAMS_PER_PROCESSOR
        assert programs * 128 * split.registers <= 65536
        if sm == 90:
            assert programs * (split.shared + 1024) <= 228 * 1024


@pytest.mark.parametrize("sm", GPUS)
@pytest.mark.parametrize(
    ("V", "dtype", "softcap", "shards"),
    [
        (128256, BF16, None, 1),
        (50257, BF16, 30.0, 1),
        (128256, FP32, 30.0, 1),
        (152064, FP16, None, 2),
        (11, BF16, None, 1),
    ],
)
def test_the_loss_reads_and_writes_whole_vectors_without_spills(V, dtype, softcap, shards, sm):
    if sm not in (80, 90) and V != 128256:
        pytest.skip("the other vocabularies are compiled for an A100 and an H100")
    logits_CV = torch.empty(8, -(-V // 16) * 16, dtype=dtype)[:, :V]
    target_C = torch.zeros(8, dtype=torch.int64)
    reduce = None if shards == 1 else lambda *_: None
    codes = compiled_by(lambda: cross_entropy_rows._losses_triton(logits_CV, target_C, softcap, True, 0, reduce), sm)
    assert len(codes) == shards
    for phase, code in enumerate(codes):
        check(code, sm)
        if V > 16:  # the target's logit comes alone
            assert "LDG.E.128" in code.sass and code.count("LDG.E.U16") <= 1
            writes = phase == shards - 1
            assert ("STG.E.128" in code.sass) == writes and "STG.E.U16" not in code.sass


def check_product(code: Compiled, dtype: torch.dtype) -> None:
    check(code, 90)
    assert (code.count("HGMMA") > 0) == (dtype != FP32), "products run on the tensor cores"
    assert code.count("UTMALDG") > 0, "tiles come through the copy engine"
    # A wait that leaves one product in flight: the next tiles are asked for while the tensor cores work.
    assert ("WARPGROUP.DEPBAR.LE gsb0, 0x1" in code.sass) == (dtype != FP32)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("C", "S", "dtype"), [(1024, 1, BF16), (1280, 8, BF16), (1000, 1, FP16), (1024, 1, FP32)])
def test_the_first_product_of_the_projector(C, S, dtype, gathered):
    if not gathered and S > 1:
        pytest.skip("rows side by side are always gathered")
    x_PC, b1_F = torch.empty(4096, C, dtype=dtype), torch.empty(4096, dtype=dtype)
    source_RS = torch.zeros(2048, S, dtype=torch.int64) if gathered else None
    w1_FK = torch.empty(4096, S * C, dtype=dtype)
    [code] = compiled_by(lambda: projector_gemm.projector_up_op(x_PC, source_RS, w1_FK, b1_F, True))
    check_product(code, dtype)
    assert ("LDGSTS" in code.sass) == gathered
    assert "LDGSTS.E.BYPASS.128" in code.sass or not gathered, "16 bytes at a time, past the registers"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_second_product_and_its_derivative(dtype):
    h_RF, w2_DF = torch.empty(2048, 4096, dtype=dtype), torch.empty(4096, 4096, dtype=dtype)
    rows_R = torch.zeros(2048, dtype=torch.int64)
    into_TD, b2_D = torch.empty(4096, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
    [down] = compiled_by(lambda: projector_gemm.projector_down_op(into_TD, rows_R, h_RF, w2_DF, b2_D))
    check_product(down, dtype)
    assert down.sass.count("STG.E.128") == down.count("STG"), "results are placed 16 bytes at a time"
    dy_RD = torch.empty(2048, 4096, dtype=dtype)
    [dgelu] = compiled_by(lambda: projector_gemm.projector_dgelu_op(dy_RD, w2_DF, h_RF, True))
    check_product(dgelu, dtype)
    config = projector_gemm.config(dtype, reads_z=True)
    elements = config["BLOCK_M"] * config["BLOCK_N"] // (32 * config["num_warps"])  # of a thread
    assert dgelu.sass.count("MUFU.EX2") == 2 * elements  # gelu once for both uses: one in erf, one in the density


def test_rows_are_copied_16_bytes_at_a_time():
    x_PW, index_R = torch.empty(64, 4096, dtype=BF16), torch.zeros(32, dtype=torch.int64)

    def call() -> None:
        projector_rows.gather_rows_op(x_PW, index_R, BF16, True)
        projector_rows.scatter_rows_op(x_PW, index_R, x_PW[:32])
        projector_rows.scatter_rows_op(x_PW, index_R, None)

    codes = compiled_by(call)
    assert [code.name for code in codes] == ["_gather_kernel", "_scatter_kernel", "_scatter_kernel"]
    for code in codes:
        check(code, 90)
        assert code.sass.count("STG.E.128") == code.count("STG")
        assert "LDG.E.128" in code.sass or code is codes[2]
