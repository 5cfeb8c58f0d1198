"""What a call costs the host: with one token of one element, and with less and less of the way to the kernel.

make call ARGS="--json benchmarks/results/call.json"
"""

import measure
import torch
from torch.utils.benchmark import Timer

CALLS = 1000  # between two looks at the clock

SETUP = """
with torch.device(device):
    ids, table = torch.zeros(1, 2, dtype=torch.int64), torch.randn(2, 1, 1)
    padding, residual = torch.zeros(1, dtype=torch.bool), torch.randn(1, 1)
x, rows, trained = ids[:, 0], table[0], table.clone().requires_grad_()
no_ids, no_padding, no_residual = ids[:0], padding[:0], residual[:0]
function, op, overload = kernel.fused_embedding_lookup, kernel.op.ops.forward, kernel.op.ops.forward.default
nothing, embedding = getattr(kernel.op.ops, "cpu_capability", None), torch.nn.functional.embedding
"""
FROZEN = "function(ids, table, padding=padding, residual=residual)"
TRAINED = "function(ids, trained, padding=padding, residual=residual)"
ARGUMENTS = "(ids, table, None, padding, residual, None, None)"
STATEMENTS = {  # in inference mode the tensors of SETUP skip what is registered for autograd
    "ours": (torch.enable_grad, FROZEN),
    "recording for autograd": (torch.enable_grad, TRAINED),
    "no_grad, a table that is trained": (torch.no_grad, TRAINED),
    "inference_mode": (torch.inference_mode, FROZEN),
    "the op, without the function": (torch.enable_grad, "op" + ARGUMENTS),
    "its overload": (torch.enable_grad, "overload" + ARGUMENTS),
    "its overload, no tokens (checks, no launch)": (
        torch.enable_grad, "overload(no_ids, table, None, no_padding, no_residual, None, None)"
    ),
    "its overload, inference tensors (no autograd layer)": (torch.inference_mode, "overload" + ARGUMENTS),
    "an op of ours that only returns a string": (torch.enable_grad, "nothing()"),
    "one F.embedding": (torch.enable_grad, "embedding(x, rows)"),
}  # fmt: skip


def main():
    parser = measure.measuring_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    args = parser.parse_args()
    kernel = measure.load_kernel(args.device)
    names = {"torch": torch, "kernel": kernel, "device": torch.get_default_device()}
    torch.set_default_device(None)  # every call would pay for looking at it
    statements = STATEMENTS.copy()
    if args.device != "cpu":
        del statements["an op of ours that only returns a string"]
    clocks = {name: clock(*call, names) for name, call in statements.items()}
    row = measure.origin(kernel, args.device, f'make call ARGS="--device {args.device}"')
    row |= {"rounds": args.rounds, "call": {name: call for name, (_, call) in statements.items()}}
    row |= measure.summary(measure.interleaved(clocks, args.rounds))
    lines = [f"{taken:9.3f} us  {name}" for name, taken in row["median_us"].items()]
    measure.write(args.json, [row], "\n".join(lines))


def clock(context, statement, names):
    timer = Timer(statement, SETUP, globals=names, num_threads=torch.get_num_threads())
    return context()(lambda: timer.timeit(CALLS).median)


if __name__ == "__main__":
    main()
