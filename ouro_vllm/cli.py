"""The `ouro-vllm` command.

For each subcommand one function adds its arguments and one runs it; what is heavy to import is imported in the latter.
"""

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ouro_vllm import __version__
from ouro_vllm.bench.modes import BASE, MODES, with_sharing
from ouro_vllm.evaluation.policies import POLICIES
from ouro_vllm.sharing import POLICIES as SERVED

BUNDLED_MODEL = Path(__file__).parents[1] / "examples" / "ouro-tiny"


def main(argv: list[str] | None = None) -> int:
    """Run `ouro-vllm` with these arguments (default: the process's). Returns the exit status.

    Everything after `--` is handed on by the subcommands that start a server.

    Raises:
        SystemExit: after --help, --version or on arguments that do not parse.
    """
    own, handed_on = split(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(own)
    if handed_on and not args.hands_on:
        parser.error(f"{args.command} takes no arguments after `--`")
    args.handed_on = handed_on
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--` and what stands after it."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. What it parses has `run`, a function from the parsed to an exit status, and
    `hands_on`, whether arguments after `--` are welcome."""
    parser = argparse.ArgumentParser(prog="ouro-vllm", description="Ouro, ByteDance's looped language model, on vLLM.")
    parser.add_argument("--version", action="version", version=f"ouro-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_serve(commands)
    add_demo(commands)
    add_chat(commands)
    add_doctor(commands)
    add_widen(commands)
    add_bench(commands)
    add_eval(commands)
    return parser


def add_serve(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "serve",
        help="`vllm serve`, started as suits this machine's vLLM",
        usage="ouro-vllm serve MODEL [arguments of vllm serve]",
    )
    command.add_argument("model", help="folder or name of the checkpoint")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on to vLLM as they are")
    command.set_defaults(run=run_serve, hands_on=True)


def run_serve(args: argparse.Namespace) -> int:
    from ouro_vllm.cpu import serve

    try:
        serve(args.model, args.arguments + args.handed_on)
    except OSError as error:
        print(f"vLLM's server cannot be run: {error}. `ouro-vllm doctor` looks for the cause.", file=sys.stderr)
    return 1


def add_demo(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "demo",
        help="start a server on a free port, ask it something, stop it",
        usage="ouro-vllm demo [MODEL] [options] [-- arguments of vllm serve]",
    )
    command.add_argument("model", nargs="?", default=str(BUNDLED_MODEL), help="folder or name (default: %(default)s)")
    command.add_argument("--prompt", help="text to continue (default: the head of a Python function)")
    command.add_argument("--question", help="question to ask as a chat (default: a sum)")
    command.add_argument("--max-tokens", type=positive, default=128, help="longest answer (default: %(default)s)")
    command.add_argument(
        "--timeout", type=float, default=900, help="seconds that the server may take to start (default: %(default)s)"
    )
    command.set_defaults(run=run_demo, hands_on=True)


def run_demo(args: argparse.Namespace) -> int:
    from ouro_vllm import demo

    prompt = demo.PROMPT if args.prompt is None else args.prompt
    question = demo.QUESTION if args.question is None else args.question
    return demo.main(args.model, prompt, question, args.max_tokens, args.timeout, args.handed_on)


def add_chat(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "chat", help="chat with a running server; what is provisional is dim until it settles"
    )
    command.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the API (default: %(default)s)")
    command.add_argument("--api-key", help="the server's API key (default: $OPENAI_API_KEY)")
    command.add_argument("--model", help="name that the server gives to the model (default: its first)")
    command.add_argument(
        "--mode", default="tail", choices=("tail", "progressive"), help="what is provisional (default: %(default)s)"
    )
    command.add_argument("--deadline-ms", type=positive, help="end every answer after so many milliseconds")
    command.add_argument("--max-tokens", type=positive, default=512, help="longest answer (default: %(default)s)")
    command.add_argument("--temperature", type=float, help="0 for the likeliest words (default: the server's)")
    command.add_argument("--loops", type=positive, help="depth of the answer (default: the server's)")
    command.add_argument("--exit-threshold", type=float, help="q of the exit gate (default: the server's)")
    command.set_defaults(run=run_chat, hands_on=False)


def run_chat(args: argparse.Namespace) -> int:
    from ouro_vllm import chat

    anytime = {"mode": args.mode} | ({"deadline_ms": args.deadline_ms} if args.deadline_ms else {})
    depth = {"ouro_loops": args.loops, "ouro_exit_threshold": args.exit_threshold}
    given = {"temperature": args.temperature, "vllm_xargs": {n: v for n, v in depth.items() if v is not None} or None}
    options = {"max_tokens": args.max_tokens, "anytime": anytime, **{n: v for n, v in given.items() if v is not None}}
    return chat.main(args.url, args.api_key, args.model, options)


def add_doctor(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("doctor", help="say what is installed and active, what is wrong and how to mend it")
    command.add_argument("model", nargs="?", type=Path, help="a checkpoint's folder, to be looked at too")
    command.set_defaults(run=run_doctor, hands_on=False)


def run_doctor(args: argparse.Namespace) -> int:
    from ouro_vllm import doctor

    return doctor.main(args.model)


def add_widen(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("widen", help="write a larger checkpoint with the same function")
    command.add_argument("source", type=Path, help="folder of an Ouro checkpoint")
    command.add_argument("target", type=Path, help="new folder for the larger one")
    command.add_argument("--hidden", type=positive, help="hidden size: the source's times 1, 2, 4, ...; heads grow too")
    command.add_argument("--layers", type=positive, help="layers of the shared stack")
    command.add_argument("--intermediate", type=positive, help="inner size of the MLP")
    command.set_defaults(run=run_widen, hands_on=False)


def run_widen(args: argparse.Namespace) -> int:
    from ouro_vllm.weights import CheckpointError
    from ouro_vllm.widen import Sizes, WidenError, looped_parameters, widen

    try:
        config = widen(args.source, args.target, Sizes(args.hidden, args.layers, args.intermediate))
    except (WidenError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {args.target}: {looped_parameters(config) / 1e6:.1f}M parameters in the shared stack")
    return 0


def add_bench(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "bench",
        help="speed of the ways of decoding, against each other on this machine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="modes:\n" + "".join(f"  {mode}: {what}\n" for mode, what in MODES.items()),
    )
    command.add_argument("folder", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    command.add_argument("--model", help=f"folder or name (default: {BUNDLED_MODEL})")
    command.add_argument("--prompts", type=Path, help="JSON list of texts (default: the model's prompts.json)")
    command.add_argument(
        "--modes",
        type=modes,
        default=["plain", "draft-verify", "wavefront"],
        help="ways to compare (default: plain,draft-verify,wavefront); plain must be among them",
    )
    command.add_argument("--batch", type=batches, default=[1, 2, 4, 8], help="requests at once (default: 1,2,4,8)")
    for name, default, what in (
        ("--rounds", 5, "measurements per start, mode and batch, after one that warms up"),
        ("--starts", 1, "starts of the engines, each followed by all rounds; not with --exit"),
        ("--tokens", 128, "tokens per answer, on average: from half as many to half as many again"),
        ("--turns", 4, "requests per place in the batch, 6 at least in all"),
        ("--passes", 8, "passes per engine step of the wavefront"),
        ("--drafts", 3, "drafts per verification of draft-verify"),
        ("--flat-rows", 64, "rows up to which a pass costs the same, in the projection"),
        ("--kv-window", 256, "newest tokens that are not shared, where loops share KV"),
    ):
        command.add_argument(name, type=positive, default=default, help=f"{what} (default: %(default)s)")
    command.add_argument("--requests", type=positive, help="in all, the same at every batch size (default: by --turns)")
    command.add_argument("--context", type=positive, help="tokens per prompt (default: the prompts as they are)")
    command.add_argument(
        "--kv-sharing",
        type=partial(listed, known=SERVED, what="KV sharing policy"),
        default=[],
        help="of last,average: every mode once more, its loops sharing KV (default: none)",
    )
    command.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of the model")
    command.add_argument("--sampled", action="store_true", help="all of it once more at temperature 0.7")
    command.add_argument("--json", type=Path, help="file for every single measurement")
    command.add_argument("--png", type=Path, help="file for a plot; needs the extra `bench`")
    command.add_argument("--readme", type=Path, help="file that takes the table between its marks")
    command.add_argument(
        "--mark", help="they are <!-- MARK --> and <!-- /MARK --> (default: bench, with --exit bench-exit)"
    )
    command.add_argument(
        "--from", dest="source", type=Path, help="report what an earlier --json holds, measure nothing"
    )
    exits = command.add_argument_group(
        "--exit", "quality and speed by depth: fixed depths, the exit gate, and for quality two rivals of the gate"
    )
    exits.add_argument("--exit", action="store_true", help="this instead; --batch is the smallest one given")
    exits.add_argument(
        "--thresholds",
        type=shares,
        default=[0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95],
        help="q of the gate (default: 0.2,0.35,0.5,0.65,0.8,0.9,0.95)",
    )
    exits.add_argument("--text", type=Path, help="held-out text (default: the bundled checkpoint's)")
    exits.add_argument("--text-tokens", type=positive, default=50_000, help="most of it (default: %(default)s)")
    exits.add_argument("--sums", type=positive, default=300, help="expressions per size (default: %(default)s)")
    command.set_defaults(run=run_bench, hands_on=False)


def shares(text: str) -> list[float]:
    """`0.5,0.9` -> both. Raises what argparse reports on anything but numbers above 0 and below 1."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < share < 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers above 0 and below 1")
    return found


def positive(text: str) -> int:
    """`8` -> 8. Raises what argparse reports on anything but a whole number from 1 on."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def batches(text: str) -> list[int]:
    """`8,1` -> [1, 8]. Raises what argparse reports where `positive` does."""
    return sorted({positive(part) for part in text.split(",")})


def listed(text: str, known: Iterable[str], what: str) -> list[str]:
    """`a,b,a` -> a, b. Raises what argparse reports on names that are not known."""
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} {name!r}: there are {', '.join(known)}")
    return chosen


def modes(text: str) -> list[str]:
    """`plain,wavefront` -> both. Raises what argparse reports on unknown modes and where plain is missing."""
    chosen = listed(text, MODES, "mode")
    if BASE not in chosen:
        raise argparse.ArgumentTypeError(f"{BASE} is missing: everything is compared with it")
    return chosen


def run_bench(args: argparse.Namespace) -> int:
    from ouro_vllm.bench import run
    from ouro_vllm.bench.results import Results

    if args.folder and args.model:
        print("Name the model once: as the argument or with --model.", file=sys.stderr)
        return 1
    mark = args.mark or ("bench-exit" if args.exit else "bench")
    results = Results(args.json, args.png, args.readme, mark)
    if args.exit:
        return run_exits(args, results)
    if args.source is not None:
        return run.redraw(args.source, args.flat_rows, results)
    return run.main(plan_of(args, with_sharing(args.modes, args.kv_sharing), args.batch), results)


def run_exits(args: argparse.Namespace, results: Any) -> int:
    from ouro_vllm.bench.exits import measure

    if args.source is not None:
        return measure.redraw(args.source, results)
    if args.starts > 1:
        print("--exit starts its engines once: leave out --starts.", file=sys.stderr)
        return 1
    speed = plan_of(args, [BASE, "wavefront"], args.batch[:1])
    plan = measure.Plan(speed, args.text, args.text_tokens, args.sums, args.thresholds)
    return measure.main(plan, results)


def plan_of(args: argparse.Namespace, compared: list[str], sizes: list[int]) -> Any:
    """The `bench.run.Plan` of these arguments, modes and batch sizes."""
    from ouro_vllm.bench import run

    return run.Plan(
        model=args.model or args.folder or str(BUNDLED_MODEL),
        batches=sizes,
        modes=compared,
        window=args.kv_window,
        context=args.context,
        count=args.requests,
        **{name: getattr(args, name) for name in ("prompts", "starts", "rounds", "tokens", "turns", "passes")},
        **{name: getattr(args, name) for name in ("drafts", "dtype", "sampled", "flat_rows")},
    )


def add_eval(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "eval",
        help="what sharing the KV cache across loops costs in quality",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="policies:\n" + "".join(f"  {policy}: {what}\n" for policy, what in POLICIES.items()),
    )
    command.add_argument(
        "model", nargs="?", type=Path, default=BUNDLED_MODEL, help="folder of the checkpoint (default: %(default)s)"
    )
    command.add_argument(
        "--kv-sharing",
        type=partial(listed, known=POLICIES, what="KV sharing policy"),
        default=list(POLICIES),
        help=f"policies to compare with per_loop (default: {','.join(POLICIES)})",
    )
    command.add_argument(
        "--kv-window",
        type=windows,
        default=[0, 64, 256],
        help="tokens of which a generated one reads its own loop's KV (default: 0,64,256)",
    )
    for name, default, what in (
        ("--block-size", 1, "tokens to a multiple of which the window's start is rounded down"),
        ("--sequences", 64, "pieces of text"),
        ("--tokens", 512, "tokens of each"),
    ):
        command.add_argument(name, type=positive, default=default, help=f"{what} (default: %(default)s)")
    command.add_argument(
        "--prompt",
        type=positive,
        help="tokens of each that are its prompt (default: half); the rest is generated",
    )
    command.add_argument(
        "--sums", type=whole, default=300, help="sums of each size; 0 leaves them out (default: %(default)s)"
    )
    command.add_argument("--text", type=Path, help="a text of your own instead of the held-out one")
    command.add_argument("--json", type=Path, help="file for all figures")
    command.add_argument("--readme", type=Path, help="file that takes the table between its marks")
    command.add_argument("--mark", default="eval", help="they are <!-- MARK --> and <!-- /MARK --> (default: eval)")
    command.add_argument(
        "--from", dest="source", type=Path, help="report what an earlier --json holds, measure nothing"
    )
    command.set_defaults(run=run_eval, hands_on=False)


def whole(text: str) -> int:
    """`0` -> 0. Raises what argparse reports on anything but a whole number from 0 on."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def windows(text: str) -> list[int]:
    """`64,0` -> [0, 64]. Raises what argparse reports where `whole` does."""
    return sorted({whole(part) for part in text.split(",")})


def run_eval(args: argparse.Namespace) -> int:
    from ouro_vllm.bench.results import Results
    from ouro_vllm.evaluation import measure

    results = Results(json=args.json, readme=args.readme, mark=args.mark)
    if args.source is not None:
        return measure.redraw(args.source, results)
    plan = measure.Plan(
        model=args.model,
        policies=args.kv_sharing,
        windows=args.kv_window,
        block=args.block_size,
        prompt=args.prompt or args.tokens // 2,
        **{name: getattr(args, name) for name in ("sequences", "tokens", "sums", "text")},
    )
    return measure.main(plan, results)


if __name__ == "__main__":
    sys.exit(main())
