"""What cards can do by their vendor's data sheets: dense matrix products of bf16 or fp16 with float32 sums, and memory.

Names are those of ``torch.cuda.get_device_name``, whole: parts of a card (MIG) and its slower relatives (NVL, laptops)
have other peaks, so they are not in the table.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    tflops: float
    gb_per_s: float


CARDS = {
    # NVIDIA A100 Tensor Core GPU data sheet; the 40 GB cards: NVIDIA A100 architecture whitepaper
    "NVIDIA A100-SXM4-80GB": Card(312, 2039),
    "NVIDIA A100-SXM4-40GB": Card(312, 1555),
    "NVIDIA A100 80GB PCIe": Card(312, 1935),
    "NVIDIA A100-PCIE-40GB": Card(312, 1555),
    # NVIDIA H100 Tensor Core GPU data sheet: SXM, PCIe (it prints rates with sparsity, twice these)
    "NVIDIA H100 80GB HBM3": Card(989.4, 3350),
    "NVIDIA H100 PCIe": Card(756, 2000),
    # NVIDIA H200 Tensor Core GPU data sheet (with sparsity, twice this rate)
    "NVIDIA H200": Card(989.4, 4800),
    # NVIDIA HGX B200 data sheet, an eighth of the board (with sparsity, twice this rate)
    "NVIDIA B200": Card(2250, 8000),
    # NVIDIA L40S data sheet
    "NVIDIA L40S": Card(362, 864),
    # Architecture whitepapers: NVIDIA Ada GPU, NVIDIA Ampere GA102 GPU, NVIDIA RTX Blackwell GPU
    "NVIDIA GeForce RTX 4090": Card(165.2, 1008),
    "NVIDIA GeForce RTX 3090": Card(71, 936),
    "NVIDIA GeForce RTX 5090": Card(209.5, 1792),
}
