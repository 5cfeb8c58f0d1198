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
import itertools
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

STEPS = (
    EMBEDDER,
    "Gemma 4 forward",
    "Gemma 4 LoRA",
    "Gemma 4 LoRA and table",
    "Qwen3-VL forward",
)


class Clock:
    """Sums the time between two kinds of events, in seconds."""

    total = 0.0

    def start(self, *_):
        self.started = measure.now()

    def stop(self, *_):
        self.total += measure.now() - self.started


def main():
    parser = measure.measuring_parser(__doc__)
    parser.add_argument("--rounds", type=int, help="default: 20 for the embedder, else 2")
    parser.add_argument("--step", choices=STEPS, nargs="+", default=STEPS)
    parser.add_argument(
        "--dtype",
        choices=measure.DTYPES,
        nargs="+",
        help="default: fp32, of the embedder bf16 too",
    )
    parser.add_argument("--patches", type=int, help="default: 2520 for Gemma 4, 1024 for Qwen3-VL")
    args = parser.parse_args()
    kernel, rows = measure.load_kernel(args.device), []
    everywhere = itertools.product(args.step, args.dtype or ["fp32"])
    of_embedder = [(EMBEDDER, "bf16")] if EMBEDDER in args.step and not args.dtype else []
    for step, dtype in [*everywhere, *of_embedder]:
        patches = args.patches or (1024 if step.startswith("Qwen") else 2520)
        rounds = args.rounds or (20 if step == EMBEDDER else 2)
        options = f"--device {args.device} --step '{step}' --dtype {dtype} --patches {patches}"
        command = f'make step ARGS="{options} --rounds {rounds}"'
        row = measure.origin(kernel, args.device, command)
        row |= {"step": step, "dtype": dtype, "patches": patches, "rounds": rounds}
        row |= measure_step(kernel, step, measure.DTYPES[dtype], patches, rounds)
        rows.append(row)
        measure.write(args.json, rows, f"{step} {dtype}: {row['median_us']} us, {row['share']}")


def measure_step(kernel, step, dtype, patches, rounds):
    torch.manual_seed(0)
    tower = {EMBEDDER: embedder, "Qwen3-VL forward": qwen3_vl}.get(step, gemma4)
    models, inputs, clocks = tower(kernel, dtype, patches)
    lookups = {name: [] for name in models}

    def seconds(name, run):
        clocks[name].total = 0.0
        start = measure.now()
        run()
        taken = measure.now() - start
        lookups[name].append(clocks[name].total)
        return taken

    whole = {}
    for name, model in models.items():
        if "LoRA" not in step:
            run = partial(torch.inference_mode()(model.eval()), *inputs)
        else:
            run = lora(model, inputs, clocks[name], train_table=step.endswith("table"))
        whole[name] = partial(seconds, name, run)
    times = measure.interleaved(whole, rounds, warm_up=1, slow=float("inf"))
    lookups = {name: taken[-rounds:] for name, taken in lookups.items()}
    share = {name: [a / b for a, b in zip(lookups[name], times[name])] for name in models}
    return measure.summary(times) | {
        "lookup_us": {n: measure.digits(statistics.median(t) * 1e6) for n, t in lookups.items()},
        "share": {name: measure.digits(statistics.median(s)) for name, s in share.items()},
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
