"""Train the bundled checkpoint as the Ouro paper trains (arXiv 2510.25741, section 3), small enough for two CPU cores.

Stage 1 trains the stack on the losses of all loops. At first the exit distribution p of the gate weighs them, under
an entropy bonus, half of each weight coming from a prior that grows with depth; later a prior that doubles from loop to
loop weighs them alone; then the last loop has two thirds and the others share the rest. A small model otherwise
collapses to shallow depths: its early loops learn first, and p feeds them. Stage 1 ends by settling: a low learning
rate and more weight on depth 1, whose readout drafts for the others when the model is served.
Stage 2 freezes the stack and teaches the gate alone whether one more loop lowers the loss.

Run it twice and the same batches come in the same order; kill it and it goes on from its last saved step.
"""

import argparse
import json
import platform
import random
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import END, IM_END, IM_START, LARGEST_TREE, Document, chats, library, sum_chat, sum_line, train_tokenizer
from model import LoopedLM, Shape, exit_distribution
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).parent
ENTROPY_BONUS = 0.1  # beta of the paper's stage 1
PRIOR_SHARE = 0.5
DEEP_FROM, LAST_FROM = 0.3, 0.65  # shares of stage 1 after which the doubling prior, then the last loop rules
SETTLED = (0.3, 0.1)  # weights of the first loop and of each one between it and the last while settling
SETTLE_RATE = 0.15  # share of the peak learning rate at which settling begins
# k and gamma of the paper's stage 2; there gamma is 0.005, but single tokens of a small model differ by more than that.
GATE_SLOPE, GATE_MARGIN = 50.0, 0.05
SUM_ROWS, CHAT_ROWS, ROWS = 4, 2, 16  # of every 16 rows of a batch
OPERAND_WEIGHT, ANSWER_WEIGHT = 0.05, 4.0  # random operands teach nothing; the answers are few
SHORT, LONG = 256, 512  # tokens in a row: the last quarter of stage 1 and all of stage 2 use long rows


class Batches:
    """Rows of text, chats and sums. `batch(step)` depends on the seed and the step alone: runs are resumable."""

    def __init__(self, tokenizer: Tokenizer, documents: list[Document], seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        end = tokenizer.token_to_id(END)
        rng = random.Random(seed)
        rng.shuffle(documents)
        talk = chats(documents)
        rng.shuffle(talk)
        encode = tokenizer.encode_batch
        self.text = np.concatenate([np.array([*e.ids, end], np.int64) for e in encode([d.text for d in documents])])
        self.chat = np.concatenate([np.array(e.ids, np.int64) for e in encode([d.text for d in talk])])

    def batch(self, step: int, progress: float, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> ids, targets, weights, each [B, length]; B keeps the tokens in a batch the same at every length.

        progress in [0, 1] grows the largest expression tree from 2 operators to LARGEST_TREE by half-way.
        """
        rng = np.random.default_rng((self.seed, step))
        dice = random.Random(int(rng.integers(2**62)))
        scale = length // SHORT
        sums, talk, rows = SUM_ROWS // scale, CHAT_ROWS // scale, ROWS // scale
        grid = np.zeros((rows, length + 1), np.int64)
        weight = np.ones((rows, length))
        for row in range(rows):
            if row < sums:
                grid[row], weight[row] = self.sums(dice, progress, length, spoken=row == 0)
            else:
                source = self.chat if row < sums + talk else self.text
                start = rng.integers(len(source) - length - 1)
                grid[row] = source[start : start + length + 1]
        ids = torch.from_numpy(grid)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.from_numpy(weight).float()

    def sums(self, dice: random.Random, progress: float, length: int, spoken: bool) -> tuple[np.ndarray, np.ndarray]:
        largest = min(LARGEST_TREE, 2 + int(progress * 2 * (LARGEST_TREE - 1)))
        write = sum_chat if spoken else sum_line
        texts = [write(dice, dice.randint(1, largest)) for _ in range(length // 5)]
        after = 2 if spoken else 1  # tokens that follow the answer: the end mark, the line end
        ids: list[int] = []
        weight: list[float] = []
        for encoding in self.tokenizer.encode_batch(texts):
            count = len(encoding.ids)
            ids += encoding.ids
            weight += [ANSWER_WEIGHT if k == count - 1 - after else OPERAND_WEIGHT for k in range(count)]
        return np.array(ids[: length + 1]), np.array(weight[1 : length + 1])


def token_losses(net: LoopedLM, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-> cross-entropy of every loop and gate logits of every loop, both [R, B, T] in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = net(ids)
        losses = [F.cross_entropy(net.readout(s).flatten(0, 1), targets.flatten(), reduction="none") for s in states]
    # The gate looks on: stage 1 shapes the stack by the losses, never by what would make exits easier to predict.
    gates = torch.stack([net.gate(s.detach()) for s in states])
    return torch.stack(losses).view(len(states), *ids.shape), gates


def loop_weights(p: Tensor, progress: float) -> Tensor:
    """Exit distribution p [R, B, T] -> weights of the loops' losses: [R, B, T], or [R, 1, 1] where p has no say.

    progress in [0, 1) is the share of stage 1's main part that is done; from 1 on the model settles.
    """
    loop = torch.arange(1.0, len(p) + 1)[:, None, None]
    if progress < DEEP_FROM:
        return PRIOR_SHARE * loop / loop.sum() + (1 - PRIOR_SHARE) * p.detach()
    if progress < LAST_FROM:
        return 2**loop / (2**loop).sum()
    if progress < 1:
        return torch.where(loop == len(p), 2 / 3, 1 / 3 / (len(p) - 1))
    first, between = SETTLED
    mix = torch.where(loop == 1, first, between)
    mix[-1] = 1 - mix[:-1].sum()
    return mix


def stage_one_loss(losses: Tensor, gates: Tensor, weights: Tensor, progress: float) -> Tensor:
    """Paper, section 3.3: expected loss under p minus beta times p's entropy; the stack's own weights from the mix."""
    p = exit_distribution(gates)
    entropy = -(p * p.clamp_min(1e-9).log()).sum(0)
    stack = (loop_weights(p, progress) * losses).sum(0)
    gate = (p * losses.detach()).sum(0) - ENTROPY_BONUS * entropy
    return (weights * (stack + gate)).sum() / weights.sum()


def stage_two_loss(losses: Tensor, gates: Tensor, weights: Tensor) -> Tensor:
    """Paper, section 3.4: the gate at loop t learns to stay where loop t + 1 lowers the token's loss."""
    stay = torch.sigmoid(GATE_SLOPE * ((losses[:-1] - losses[1:]).clamp_min(0) - GATE_MARGIN))
    wrong = F.binary_cross_entropy_with_logits(-gates[:-1], stay, reduction="none").mean(0)
    return (weights * wrong).sum() / weights.sum()


def freeze_stack(net: LoopedLM) -> None:
    net.requires_grad_(False)
    net.model.early_exit_gate.requires_grad_(True)


def optimizers(net: LoopedLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the shared stack, AdamW for everything else."""
    matrices = [p for p in net.model.layers.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in net.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=peak, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=peak / 5, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int, settle: int) -> float:
    """Share of the peak learning rate: 40 steps up, level, down over the last 60%; settling starts over, low."""
    if step >= steps:
        return SETTLE_RATE * (steps + settle - step) / settle
    return min(1.0, (step + 1) / 40, (steps - step) / (0.6 * steps))


class Run:
    """One training run in a folder: what is saved, where it goes on, what it writes at the end."""

    def __init__(self, folder: Path, seed: int, shape: Shape, peak: float) -> None:
        """Raises SystemExit where the folder holds a run of another seed, shape or learning rate."""
        folder.mkdir(parents=True, exist_ok=True)
        self.state_file, self.folder = folder / "state.pt", folder
        self.identity = {"seed": seed, "lr": peak, **asdict(shape)}
        torch.manual_seed(seed)
        self.net = LoopedLM(shape)
        self.tuners = optimizers(self.net, peak)
        self.gate_tuner = torch.optim.AdamW(self.net.model.early_exit_gate.parameters(), lr=0.02, weight_decay=0.0)
        self.step = 0
        if self.state_file.exists():
            saved = torch.load(self.state_file, weights_only=True)
            if saved.get("identity", self.identity) != self.identity:
                sys.exit(f"{folder} holds a run with {saved['identity']}: name another folder with --work.")
            self.net.load_state_dict(saved["net"])
            for tuner, state in zip([*self.tuners, self.gate_tuner], saved["tuners"], strict=True):
                tuner.load_state_dict(state)
            self.step = saved["step"]

    def save(self) -> None:
        state = {"net": self.net.state_dict(), "tuners": [t.state_dict() for t in [*self.tuners, self.gate_tuner]]}
        part = self.state_file.with_suffix(".part")
        torch.save({**state, "step": self.step, "identity": self.identity}, part)
        part.replace(self.state_file)

    def train(self, batches: Batches, args: argparse.Namespace) -> None:
        lossy = token_losses if args.eager else torch.compile(token_losses, dynamic=False)
        stack_steps = args.steps + args.settle_steps
        total = stack_steps + args.gate_steps
        bar = tqdm(total=total, initial=self.step, unit="step", mininterval=5)
        smooth = None
        while self.step < total:
            first = self.step < stack_steps
            length = SHORT if self.step < 0.75 * args.steps else LONG
            ids, targets, weights = batches.batch(self.step, self.step / args.steps, length)
            if first:
                losses, gates = lossy(self.net, ids, targets)
                stage_one_loss(losses, gates, weights, self.step / args.steps).backward()
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                share, tuners = rate(self.step, args.steps, args.settle_steps), self.tuners
            else:
                freeze_stack(self.net)
                losses, gates = lossy(self.net, ids, targets)
                stage_two_loss(losses, gates, weights).backward()
                share, tuners = 1 - (self.step - stack_steps) / args.gate_steps, [self.gate_tuner]
            for tuner, peak in zip(tuners, [args.lr, args.lr / 5] if first else [0.02], strict=True):
                tuner.param_groups[0]["lr"] = peak * share
                tuner.step()
                tuner.zero_grad(set_to_none=True)
            depth = (losses.detach() * weights).sum((1, 2)) / weights.sum()
            smooth = depth if smooth is None else smooth.lerp(depth, 0.05)
            self.step += 1
            bar.set_postfix_str("loss by depth " + " ".join(f"{x:.3f}" for x in smooth.tolist()), refresh=False)
            bar.update()
            if self.step % args.save_every == 0 or self.step in (args.steps, stack_steps, total):
                self.save()
        bar.close()


def export(net: LoopedLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the published layout: config.json, model.safetensors (bfloat16), tokenizer, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = net.shape
    config = {
        "architectures": ["OuroForCausalLM"],
        "model_type": "ouro",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_attention_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "layer_types": ["full_attention"] * shape.num_hidden_layers,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "total_ut_steps": shape.total_ut_steps,
        "early_exit_threshold": 1.0,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0})
    tokens = {"bos_token": IM_START, "eos_token": IM_END, "pad_token": END}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.max_position_embeddings}
    write_json(folder / "tokenizer_config.json", {**kind, **tokens, "add_bos_token": False})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text((HERE / "chat_template.jinja").read_text())
    tensors = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in net.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def write_json(path: Path, value: dict | list) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/tiny"), help="folder for what a killed run goes on from"
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "ouro-tiny", help="folder of the finished checkpoint")
    parser.add_argument("--steps", type=int, default=1800, help="stage 1: steps of 4,096 tokens (default %(default)s)")
    parser.add_argument(
        "--settle-steps", type=int, default=300, help="stage 1: further steps to settle (default %(default)s)"
    )
    parser.add_argument("--gate-steps", type=int, default=120, help="stage 2: steps of the gate (default %(default)s)")
    parser.add_argument("--lr", type=float, default=0.03, help="peak learning rate of Muon (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, text order and sums (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between saves (default %(default)s)")
    parser.add_argument(
        "--eager", action="store_true", help="do not compile: starts at once, runs at two thirds of the speed"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    shape = Shape()
    documents = [d for d in library() if not d.held_out]
    tokenizer = train_tokenizer(documents, shape.vocab_size, args.seed)
    batches = Batches(tokenizer, documents, args.seed)
    run = Run(args.work, args.seed, shape, args.lr)
    count = sum(p.numel() for p in run.net.parameters())
    print(
        f"{count / 1e6:.1f}M parameters; {len(batches.text) / 1e6:.1f}M tokens of text; from step {run.step}",
        flush=True,
    )
    run.train(batches, args)
    export(run.net, tokenizer, args.out)
    record = {
        "steps": args.steps,
        "settle_steps": args.settle_steps,
        "gate_steps": args.gate_steps,
        "tokens_per_step": ROWS * SHORT,
        "longest_row": LONG,
        "text_tokens": len(batches.text),
        "lr": args.lr,
        "seed": args.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_json(args.out / "training.json", record)
    print(f"wrote {args.out}; next: python {HERE / 'evaluate.py'} {args.out}", flush=True)


if __name__ == "__main__":
    main()
