"""Bytes that a decoder block moves between its matrix products, beside the least that fused kernels would move.

    python -m tests.measurements.elementwise_bytes

No GPU is needed, and no time is measured. **Eager**: tensors of a GPU without data run through the functions of
``avlm/models/decoder.py`` and ``rope.py``; each operator counts the tensors that it reads and writes. **Compiled**:
TorchInductor compiles a block for the CPU, its attention an opaque operator; each kernel of its schedule counts the
buffers that it reads and writes. Products and attention are left out, and with them the block's last sum, which is the
addend of a product.

The least is each tensor once: of an eager function, its inputs, results and gradients; of a compiled block, what
enters and leaves each stretch between two products. Angles and weights of norms are no part of it.

T tokens   D hidden   F intermediate   Q, K all heads of queries, of keys   E head dim
"""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
import torch._inductor.cpu_vec_isa
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avlm.config.decoder import DecoderConfig
from avlm.models.decoder import Block, RMSNorm
from avlm.models.rope import rope_frequencies, rope_table, rotate

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32, "num_kv_heads": 8}
SMALL = {"hidden_size": 1024, "intermediate_size": 3584, "num_heads": 8, "num_kv_heads": 2}  # a compiled block runs
HALF = 2  # bytes of a bfloat16
MOVES_NOTHING = {"empty", "empty_like", "detach", "device"}


def config_of(sizes: dict[str, int]) -> DecoderConfig:
    return DecoderConfig(vocab_size=8, num_layers=1, **sizes)


class Bytes(TorchDispatchMode):
    """Counts what operators read and write while it is entered."""

    total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        if operator.is_view or operator.overloadpacket.__name__ in MOVES_NOTHING:
            return out
        self.total += num_bytes(args) + num_bytes(out)
        if operator is torch.ops.aten._fused_rms_norm_backward.default:
            self.total += num_bytes(args[:2])  # the weight's gradient is a kernel of its own, which reads both again
        return out


def num_bytes(tree: Any) -> int:
    """Of all tensors in arguments or results. What is repeated along a dim counts once."""
    total = 0
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor):
            stored = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
            total += tensor.element_size() * math.prod(stored)
    return total


def eager(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Bytes of a function's forward and backward, in bfloat16. Inside of a FakeTensorMode."""
    inputs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda:0", requires_grad=True) for shape in shapes]
    with Bytes() as forward:
        y = function(*inputs)
    gradient = torch.empty_like(y)
    with torch.no_grad(), Bytes() as backward:
        walk_back(y.grad_fn, gradient)
    return forward.total, backward.total


def walk_back(node: Any, gradient: Tensor) -> None:
    """The backward of a tree of nodes. (Autograd's engine wants a GPU for tensors of one.)"""
    if node is None or not node.next_functions:
        return
    if isinstance(node, BackwardCFunction):
        gradients = node.apply(gradient)
    else:
        gradients = node(gradient, *[None] * (len(node._input_metadata) - 1))
    for (earlier, _), of_input in zip(node.next_functions, tree_leaves(gradients)):
        walk_back(earlier, of_input)


def eager_block(sizes: dict[str, int] = LLAMA_8B, T: int = 8192) -> dict[str, tuple[int, int]]:
    """name -> (bytes moved, the least), forward and backward, of all calls of a function in a block."""
    config = config_of(sizes)
    D, width = config.hidden_size, config.intermediate_size
    with FakeTensorMode():
        weight = torch.empty(D, dtype=torch.bfloat16, device="cuda:0", requires_grad=True)
        norm = RMSNorm(D, config.norm_eps)
        norm.weight = nn.Parameter(weight)
        angles = torch.empty(T, config.head_dim, device="cuda:0")
        turn = lambda x_THE: rotate(x_THE, angles, angles)
        heads = {count: eager(turn, [(T, count, config.head_dim)]) for count in (config.num_heads, config.num_kv_heads)}
        norms = eager(norm, [(T, D)])
        swiglu = eager(lambda gate, up: F.silu(gate) * up, [(T, width), (T, width)])
    Q, K = (count * config.head_dim for count in heads)
    return {
        "RMSNorm": (2 * sum(norms), 2 * (2 + 3) * HALF * T * D),
        "rotate": (sum(map(sum, heads.values())), (2 + 2) * HALF * T * (Q + K)),
        "SwiGLU": (sum(swiglu), (3 + 5) * HALF * T * width),
    }


@torch.library.custom_op("avlm_count::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.clone()


@torch.library.custom_op("avlm_count::attention_backward", mutates_args=())
def attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.clone(), k.clone(), v.clone()


attention.register_fake(lambda q, k, v: torch.empty_like(q))
attention_backward.register_fake(lambda dout, *qkv: tuple(map(torch.empty_like, qkv)))
attention.register_autograd(
    lambda ctx, dout: attention_backward(dout, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class OpaqueCore(nn.Module):
    def forward(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: None) -> Tensor:
        return attention(q_THE, k_TKE, v_TKE)


def compiled_block(sizes: dict[str, int] = SMALL, T: int = 256) -> tuple[list[int], list[int]]:
    """Bytes of the compiled forward and backward, and the least of both."""
    config = config_of(sizes)
    block = Block(config, 0).bfloat16()
    block.attention.core = OpaqueCore()
    rope = rope_table(rope_frequencies(config), torch.arange(T))
    x_TD = torch.randn(T, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    moved = []
    codegen = GraphLowering.codegen

    def counted(graph: GraphLowering) -> Any:
        code = codegen(graph)
        nodes = [node for node in graph.scheduler.nodes if not isinstance(node, ExternKernelSchedulerNode)]
        moved.append(sum(node.get_read_write_buffers_sizes() for node in nodes))
        return code

    nothing = lambda *_, **__: lambda *_: None  # machine code is not needed to count, and takes a minute
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        mock.patch.object(torch._inductor.cpu_vec_isa, "valid_vec_isa_list", list),
        mock.patch.object(AsyncCompile, "cpp_pybinding", nothing),
        mock.patch.object(GraphLowering, "codegen", counted),
    ):
        y_TD = torch.compile(block, fullgraph=True)(x_TD, rope, None)
        y_TD.backward(torch.ones_like(y_TD))
    D, width = config.hidden_size, config.intermediate_size
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    # Norm: x, y. Rotation. Sum and norm: x, o, sum, y. SwiGLU: gate, up, y.
    forward = 2 * D + 2 * heads + 4 * D + 3 * width
    # SwiGLU. Norm and sum: gradients of gate, of up and of the sum, x, dx. Rotation. The same with q, k, v and the sum.
    backward = 5 * width + 5 * D + 2 * heads + 6 * D
    return moved, [HALF * T * forward, HALF * T * backward]


def main() -> None:
    print("eager, hidden 4096, 8192 tokens, forward and backward of a block   GB      least   ratio")
    rows = eager_block()
    rows["together"] = tuple(map(sum, zip(*rows.values())))
    for name, (moved, least) in rows.items():
        print(f"{name:<66} {moved / 1e9:>6.2f}  {least / 1e9:>6.2f}  {moved / least:>6.2f}")
    print("compiled, hidden 1024, 256 tokens                                  MB      least   ratio")
    moved, least = compiled_block()
    for name, of, to in (*zip(("forward", "backward"), moved, least), ("together", sum(moved), sum(least))):
        print(f"{name:<66} {of / 1e6:>6.2f}  {to / 1e6:>6.2f}  {of / to:>6.2f}")


if __name__ == "__main__":
    main()
