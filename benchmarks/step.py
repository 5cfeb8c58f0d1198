"""What share of a whole step the lookup is, before and after our layer is swapped in.

    make step
    make step ARGS="--step 'Qwen3-VL forward' --dtype bf16 --json out.json"

The towers have their real sizes and random weights, and see one image. A LoRA step trains the attention's
projections (PEFT), and the position table too or not; with a frozen one the backward has nothing to look up. The
lookup is timed where it is: in the forward from the end of the patch projection to the end of the embedding, Qwen's
ids and weights included; in the backward from the embedding's gradient to the table's. Qwen's tower after
is patched as in upstream/. The embedder is alone, of four images, and its projection's result is there already: what
is timed is all but the matrix product. Before and after take turns.
"""

import copy
import statistics
import sys
from functools import partial
from types import MethodType

import measure
import torch
from cases import EMBEDDER
from peft import LoraConfig, get_peft_model
from transformers import Gemma4VisionConfig, Gemma4VisionModel
from transformers.models.qwen3_vl import Qwen3VLVisionConfig, modeling_qwen3_vl

sys.path.append(str(measure.ROOT / "upstream"))
import patched

STEPS = {  # of how many patches; in how many rounds, and in which dtypes, unless told otherwise
    EMBEDDER: (2520, 20, ("fp32", "bf16")),
    "Gemma 4 forward": (2520, 2, ("fp32",)),
    "Gemma 4 LoRA": (2520, 2, ("fp32",)),
    "Gemma 4 LoRA and table": (2520, 2, ("fp32",)),
    "Qwen3-VL forward": (1024, 2, ("fp32",)),
}


def main():
    parser = measure.measuring_parser(__doc__)
    parser.add_argument("--step", choices=STEPS, nargs="+", default=STEPS)
    parser.add_argument("--dtype", choices=measure.DTYPES, nargs="+", help="default: the step's")
    parser.add_argument("--patches", type=int, help="default: the step's")
    parser.add_argument("--rounds", type=int, help="default: the step's")
    args = parser.parse_args()
    kernel, rows = measure.load_kernel(args.device), []
    for step in args.step:
        patches, rounds, dtypes = STEPS[step]
        patches, rounds = args.patches or patches, args.rounds or rounds
        for dtype in args.dtype or dtypes:
            options = f"--device {args.device} --step '{step}' --dtype {dtype} --patches {patches}"
            command = f'make step ARGS="{options} --rounds {rounds}"'
            row = measure.origin(kernel, args.device, command)
            row |= {"step": step, "dtype": dtype, "patches": patches, "rounds": rounds}
            row |= measure_step(kernel, step, measure.DTYPES[dtype], patches, rounds)
            rows.append(row)
            measure.write(args.json, rows, f"{step} {dtype}: {row['median_us']} us, {row['share']}")


class Clock:
    """Times a step, in seconds, and the lookups in it, between two kinds of events."""

    def __init__(self):
        self.lookups = []  # a step

    def start(self, *_):
        self.started = measure.now()

    def stop(self, *_):
        self.lookups[-1] += measure.now() - self.started

    def time(self, step):
        self.lookups.append(0.0)
        start = measure.now()
        step()
        return measure.now() - start


def measure_step(kernel, step, dtype, patches, rounds):
    torch.manual_seed(0)
    tower = {EMBEDDER: embedder, "Qwen3-VL forward": qwen3_vl}.get(step, gemma4)
    models, inputs, clocks = tower(kernel, dtype, patches)
    steps = {}
    for name, model in models.items():
        if "LoRA" in step:
            run = lora(model, inputs, clocks[name], train_table=step.endswith("table"))
        else:
            run = partial(torch.inference_mode()(model.eval()), *inputs)
        steps[name] = partial(clocks[name].time, run)
    times = measure.interleaved(steps, rounds, warm_up=1, slow=float("inf"))
    lookups = {name: clock.lookups[-rounds:] for name, clock in clocks.items()}
    shares = {name: [a / b for a, b in zip(lookups[name], times[name])] for name in models}
    return measure.summary(times) | {
        "lookup_us": {n: measure.digits(statistics.median(t) * 1e6) for n, t in lookups.items()},
        "share": {name: measure.digits(statistics.median(s)) for name, s in shares.items()},
    }


def swap(module, layer):
    """What kernels.kernelize does with a layer: its forward on the module that is there."""
    module.forward = MethodType(layer.forward, module)


def gemma4(kernel, dtype, patches):
    """The tower before and after, what it is called with, and clocks of the lookups."""
    model = Gemma4VisionModel(Gemma4VisionConfig()).to(dtype)
    torch.nn.init.normal_(model.patch_embedder.position_embedding_table)
    models = {"before": model, "ours": copy.deepcopy(model)}
    swap(models["ours"].patch_embedder, kernel.layers.Gemma4VisionPatchEmbedder)
    clocks = {name: Clock() for name in models}
    for name, model in models.items():
        model.patch_embedder.input_proj.register_forward_hook(clocks[name].start)
        model.patch_embedder.register_forward_hook(clocks[name].stop)
    ids = measure.arguments(kernel, measure.Case(batch=1, patches=patches))["position_ids"]
    return models, (torch.rand(1, patches, 768), ids), clocks


def embedder(kernel, dtype, patches):
    towers, (_, ids), clocks = gemma4(kernel, dtype, patches)
    models = {name: tower.patch_embedder for name, tower in towers.items()}
    ids = ids.repeat(4, 1, 1)
    projected = torch.randn(4, patches, towers["ours"].config.hidden_size, dtype=dtype)
    for model in models.values():
        model.input_proj.forward = lambda pixels: projected
    return models, (torch.rand(4, patches, 768), ids, (ids == -1).all(-1)), clocks


def qwen3_vl(kernel, dtype, patches):
    model = modeling_qwen3_vl.Qwen3VLVisionModel(Qwen3VLVisionConfig()).to(dtype)
    torch.nn.init.normal_(model.pos_embed.weight)
    models = {"before": model, "ours": patched.patch_model(model)}
    swap(models["ours"].add_pos_embed, kernel.layers.VisionInterpolatedPositionEmbedding)
    clocks = {name: Clock() for name in models}
    for name, model in models.items():
        model.patch_embed.register_forward_hook(clocks[name].start)
        model.rotary_pos_emb.register_forward_pre_hook(clocks[name].stop)
    # transformers' own tower makes the ids and weights before it projects the patches.
    function = modeling_qwen3_vl.get_vision_interpolation_indices_and_weights

    def timed(*args, **kwargs):
        clocks["before"].start()
        result = function(*args, **kwargs)
        clocks["before"].stop()
        return result

    modeling_qwen3_vl.get_vision_interpolation_indices_and_weights = timed
    grid, _ = measure.square_images(measure.Case(batch=1, patches=patches))
    return models, (torch.randn(patches, 3 * 2 * 16 * 16, dtype=dtype), grid), clocks


def lora(model, inputs, clock, train_table):
    """A function that takes a training step."""
    embedder = model.patch_embedder
    model = get_peft_model(model, LoraConfig(target_modules=r".*self_attn\.[qkvo]_proj.*linear"))
    table = embedder.position_embedding_table.requires_grad_(train_table)
    if train_table:
        embedder.register_forward_hook(
            lambda module, _, out: out.register_hook(clock.start) and None
        )
        table.register_post_accumulate_grad_hook(clock.stop)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()

    def step():
        model(*inputs).last_hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
