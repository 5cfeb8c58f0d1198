"""The lists of cases that compare.py measures, the sweeps among them, and the goals."""

from measure import DTYPES, Case

MAIN = Case()
IMAGE = Case(batch=1)
FORTY = Case(batch=40)
RANDOM, SINGLE = Case(ids="random"), Case(ids="single")
UNIFIED = Case(patches=1120, hidden=3840, rows=1120)  # Gemma 4 Unified
QWEN = Case(1, 4096, 1152, 2304, entries=4, shared=1, weighted=1, ids="interpolated")
DIRECTIONS = ("forward", "backward")


def each(*bases, dtypes=("bf16",), directions=DIRECTIONS, **changes):
    return [
        base._replace(dtype=dtype, direction=direction, **changes)
        for base in bases
        for dtype in dtypes
        for direction in directions
    ]


def varied(base, **sizes):
    ((name, values),) = sizes.items()
    return [base._replace(**{name: value}) for value in values]


BOTH = ("fp32", "bf16")
QWENS = varied(QWEN, patches=(256, 4096, 16384))
COMPUTED = each(
    *QWENS[1:], dtypes=BOTH[::-1], directions=["forward"], ids="computed", peers=("eager",)
)
# The plots: an image of 70 to 1120 soft tokens, and batches of which the one-hot fits in memory.
TIMES = varied(IMAGE, patches=(630, 1260, 2520, 5040, 10080))
MEMORY = varied(Case(dtype="fp32", peers=("eager", "one-hot"), rounds=2), batch=(1, 2, 4, 8))
OPS = [
    *each(MAIN, dtypes=DTYPES, rounds=30),
    *each(RANDOM, SINGLE, dtypes=BOTH),
    *each(MAIN._replace(hidden=1152), UNIFIED),
    *each(*TIMES, dtypes=BOTH, directions=["forward"]),
    *each(IMAGE, dtypes=BOTH, directions=["backward"]),
    *each(*QWENS, dtypes=BOTH[::-1]),
    *each(MAIN, dtypes=["fp32"], pages="small"),
]

# Each changes one size. The others are one image's, with few ids, each of them many times.
FEW = Case(batch=1, ids="few", peers=("eager",), rounds=8)
TOKENS = [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000]
SWEEPS = {
    "N, H=64": varied(FEW._replace(hidden=64), patches=TOKENS),
    "N": varied(FEW, patches=TOKENS),
    "B": varied(FEW, batch=(1, 2, 4, 8, 16, 32)),
    "H": varied(FEW, hidden=(64, 128, 256, 768, 1152, 2304, 3840)),
    "P": varied(FEW, rows=(128, 1024, 10240, 65_536, 262_144)),
    "K": varied(FEW, entries=(1, 2, 3, 4)),
    # A language model's ids, and audio codebooks: nothing grows with a product of sizes.
    "N, all of P=262,144, H=64": varied(
        FEW._replace(rows=262_144, hidden=64, entries=1, ids="random"), patches=TOKENS[6::2]
    ),
    "K, all of P=2,050, H=1,024": varied(
        FEW._replace(rows=2050, hidden=1024, ids="random"), entries=(1, 4, 16, 64)
    ),
}
SIZES = {"N": "patches", "B": "batch", "H": "hidden", "P": "rows", "K": "entries"}

LISTS = {
    "cpu": [*OPS, *COMPUTED, *MEMORY],
    "scaling": [case for sweep in SWEEPS.values() for case in each(*sweep)],
    "gpu": [  # what matters most first
        *each(*varied(FORTY, ids=("grid", "random", "single")), *QWENS[1:], IMAGE),
        *COMPUTED[::2],
        *each(*varied(IMAGE, ids=("random", "single")), FORTY._replace(hidden=1152)),
        *each(IMAGE._replace(rows=1024, peers=("eager", "one-hot"))),
    ],
    "gate": each(MAIN._replace(peers=("eager",), rounds=15), dtypes=BOTH),
}

# On a device, of what a row measures: for each peer how many times as fast we are to be, for "copy" the share of its
# bandwidth, at least; and "us" and "ops" at most.
FAST = {"eager": 5, "torch.compile": 1, "embedding_bag": 1.5}
FASTER = {"eager": 6, "torch.compile": 6}
BACKWARD, FP32 = {"direction": "backward"}, {"dtype": "fp32"}
EMBEDDER = "Gemma 4 embedder"  # of make step
GOALS = [
    ("cpu", MAIN._replace(**FP32), {"eager": 4, "torch.compile": 1.1}),
    ("cpu", MAIN, {"eager": 7, "torch.compile": 1}),
    ("cpu", MAIN._replace(**FP32, **BACKWARD), {"eager": 4, "torch.compile": 5}),
    ("cpu", MAIN._replace(**BACKWARD), {"eager": 4, "torch.compile": 8}),
    ("cpu", RANDOM._replace(**FP32, **BACKWARD), {"copy": 0.25}),
    ("cpu", RANDOM._replace(**BACKWARD), {"copy": 0.25}),
    ("cpu", QWENS[0], {"eager": 10, "torch.compile": 2}),
    ("cpu", QWENS[1], {"eager": 30, "torch.compile": 1.1}),
    ("cpu", QWENS[2], {"eager": 20, "torch.compile": 1.1}),
    ("cpu", QWENS[0]._replace(**FP32), {"eager": 2, "torch.compile": 1.5}),
    ("cpu", QWENS[1]._replace(**FP32), {"eager": 20, "torch.compile": 20}),
    ("cpu", QWENS[2]._replace(**FP32), {"eager": 8, "torch.compile": 8}),
    ("cpu", QWENS[0]._replace(**BACKWARD), {"eager": 2, "torch.compile": 8}),
    ("cpu", QWENS[1]._replace(**BACKWARD), {"eager": 8, "torch.compile": 4}),
    ("cpu", QWENS[2]._replace(**BACKWARD), {"eager": 8, "torch.compile": 4}),
    ("cpu", COMPUTED[0], {"eager": 25, "ops": 2}),
    ("gpu", FORTY, FAST | {"copy": 0.95}),
    ("gpu", FORTY._replace(**BACKWARD), FASTER | {"copy": 1 / 1.3}),
    ("gpu", FORTY._replace(ids="random"), {"copy": 0.9}),
    ("gpu", FORTY._replace(ids="random", **BACKWARD), {"copy": 1 / 1.9}),
    ("gpu", FORTY._replace(ids="single"), FAST | {"copy": 0.95}),
    ("gpu", FORTY._replace(ids="single", **BACKWARD), {"copy": 1 / 1.4}),
    ("gpu", FORTY._replace(hidden=1152), FAST | {"copy": 0.9}),
    ("gpu", FORTY._replace(hidden=1152, **BACKWARD), FASTER | {"copy": 1 / 1.5}),
    ("gpu", IMAGE, {"eager": 4}),
    ("gpu", IMAGE._replace(**BACKWARD), {"us": 20}),
    ("gpu", IMAGE._replace(ids="random", **BACKWARD), {"us": 30}),
    ("gpu", IMAGE._replace(ids="single", **BACKWARD), {"us": 20}),
    ("gpu", QWENS[1], {"copy": 0.9}),
    ("gpu", QWENS[2], {"copy": 0.9}),
    ("cpu", "a call, no_grad, a table that is trained", {"us": 5}),
    ("cpu", "a call, inference_mode", {"us": 4}),
    ("cpu", f"{EMBEDDER} fp32", {"eager": 4}),
    ("cpu", f"{EMBEDDER} bf16", {"eager": 4}),
]
