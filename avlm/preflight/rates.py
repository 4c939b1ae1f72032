"""How fast a GPU, its links and its host are assumed to be, for ``avlm.preflight.step_time``. Data sheets say what is
possible; what is reached is an assumption: **nothing of ours has run on a GPU**. Whoever has measured one corrects it
here."""

from dataclasses import dataclass

from kernels.benchmark.cards import CARDS, Card

# 1. Data sheets.


@dataclass(frozen=True)
class Gpu:
    """A GPU of a machine of eight. Links in bytes/s in one direction, memory in bytes."""

    card: Card
    nvlink: float
    nic: float
    memory: float


# NVLink: half of the total bandwidth that NVIDIA's data sheet of the GPU names. Network: a share of the ports of a DGX
# A100, H100, H200 or B200 (its data sheet): 200 Gb/s a GPU, then 400. Memory of a B200: an eighth of a DGX B200's.
GPUS = {
    "a100": Gpu(CARDS["NVIDIA A100-SXM4-80GB"], 300e9, 25e9, 80e9),
    "h100": Gpu(CARDS["NVIDIA H100 80GB HBM3"], 450e9, 50e9, 80e9),
    "h200": Gpu(CARDS["NVIDIA H200"], 450e9, 50e9, 141e9),
    "b200": Gpu(CARDS["NVIDIA B200"], 900e9, 50e9, 180e9),
}
NODE = 8  # GPUs of a machine

# 2. What is reached, as shares of these.

PRODUCT = 0.65  # of the bf16 peak: large products of cuBLAS
ATTENTION_FORWARD = 0.40  # of the bf16 peak: kernels of FlashAttention 2's class, heads of 128, on an H100
ATTENTION_BACKWARD = 0.28
HBM = 0.80  # of the memory's rate: elementwise kernels
LINK = 0.80  # of NVLink's: NCCL inside a machine
NETWORK = 0.85  # of the network's: NCCL between machines
HOP_INSIDE, HOP_BETWEEN = 2e-6, 8e-6  # seconds that a message takes at least

# 3. The host. Measured on a slow core without a GPU (Python and dispatch of a block with tiny tensors), and halved.

BLOCK = {"none": 2.5e-3, "selective": 5.3e-3, "full": 3.6e-3}  # seconds: forward, backward and recomputation, eager
TENSOR_BLOCK = 1.8  # times as long with DTensor
FORWARD_SHARE = 1 / 3  # of that, for the forward of a block of a frozen tower
RING_STEP = 0.12e-3  # of a step of a ring, in either direction
HOST_HOP = 30e-6  # of gloo over TCP; a sum over N ranks has 2 (N - 1)
TCP = 1.2e9  # bytes/s of one stream of gloo

# 4. Checkpoints.

STORE_OF_NODE, STORE = 8e9, 100e9  # bytes/s that a machine writes, and all together
STAGING = 20e9  # bytes/s from a GPU to pinned memory (PCIe 4 x16 gives 32e9)
SAVE_PLAN = 0.16  # seconds of the first rank, with 256 ranks, after the first save

# 5. Bytes that elementwise kernels move for each number of a tensor of bf16, forward and backward, as
# ``tests/measurements/elementwise_bytes.py`` counts: a norm, a rotated query or key, gate and up, a residual.

NORM, ROTATED, SWIGLU, RESIDUAL = (4, 10), (10.25, 10.25), (10, 18), (6, 6)
OFFSET_NORM = (20, 32)  # of 1 + weight: no kernel takes bf16 and a scale in float32, so there are casts around it
COMPILED_D, COMPILED_QK, COMPILED_F = (12.6, 24.2), (4.2, 4.4), (6.3, 11)  # together, compiled: width, q and k, MLP
COPIED_ROW = 4  # of a row that is read by its index and written, to an expert or back
TOWER_D, TOWER_F = (20, 40), (4, 10)  # two LayerNorms and residuals; an activation
# For each number that trains, by how moments are held: the step, clipping. fp32 is one kernel; bf16 is operators one
# after the other, most of them for the random bits, and fused it would be 20.
ADAMW = {"fp32": 28 + 12, "bf16": 448 + 12}
COPIED_IN, COPIED_OUT = 4, 6  # bytes of FSDP for each number: a gather into its weights, a gradient into the sum
