"""The kernel against its peers, interleaved in one run (measure.py), for one case or a list of them (cases.py).

    make bench ARGS="--batch 40 --dtype fp32 bf16 --direction forward backward --json out.json"
    make bench ARGS="--list cpu --json benchmarks/results/cpu.json"

Of several values for an option all combinations are measured. With a list, an option changes all its cases.
"""

import itertools

import measure
from cases import LISTS
from measure import Case


def main():
    parser = measure.measuring_parser(__doc__)
    parser.add_argument("--list", choices=LISTS)
    for name, default in Case._field_defaults.items():
        kind = int if isinstance(default, int) else str
        parser.add_argument(f"--{name}", nargs="+", type=kind, help=f"{default}")
    args = parser.parse_args()
    changes = {name: vars(args)[name] for name in Case._fields if vars(args)[name]}
    if args.peers:
        changes["peers"] = [tuple(args.peers)]
    cases = [
        case._replace(**dict(zip(changes, values)))
        for case in (LISTS[args.list] if args.list else [Case()])
        for values in itertools.product(*changes.values())
    ]
    kernel, rows = measure.load_kernel(args.device), []
    for case in dict.fromkeys(cases):
        origin = measure.origin(kernel, args.device, command(args.device, case))
        rows.append(origin | measure.measure(kernel, case))
        measure.write(args.json, rows, f"{case}: {text(rows[-1])}")


def command(device, case):
    """The line that measures a case again."""
    options = [] if device == "cpu" else ["--device", device]
    for name, default in Case._field_defaults.items():
        value = getattr(case, name)
        if value != default:
            options += [f"--{name}", *map(str, value if name == "peers" else [value])]
    return f'make bench ARGS="{" ".join(options)}"'


def text(row):
    ratios = [
        f"{peer} {r:.3g}x [{low:.3g}, {high:.3g}]" for peer, (r, low, high) in row["ratio"].items()
    ]
    return ", ".join([f"ours {row['median_us']['ours']:,g} us", *ratios])


if __name__ == "__main__":
    main()
