"""The messages of our errors, found in the source, and what they name: commands, flags, settings, variables, files.

python -m tests.remedies      each message that names something, with what it names
"""

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.settings import loader, renamed
from core.settings.evaluation import EvaluateConfig
from core.settings.inference import ExportConfig, ServeConfig
from core.settings.preparation import FetchConfig, PrepConfig
from core.settings.training import PretrainConfig
from core.settings.tuning import DistilConfig, DpoConfig, FinetuneConfig, SynthesisConfig
from tests import variables
from trainer.chat import ChatConfig
from trainer.generate import GenerateConfig

ROOT = Path(__file__).parent.parent
ROOMS = ("core", "clouds", "costs", "data_prep", "launch", "trainer")
TRAINING = (PretrainConfig, FinetuneConfig, DpoConfig, DistilConfig)
INFERENCE = (GenerateConfig, ChatConfig, ServeConfig)
# The schemas of the programs that raise the messages of a folder: the first row that fits. An empty one: any program.
SCHEMAS = (
    ("data_prep/", (PrepConfig, FetchConfig)),
    ("trainer/synthesis/", (SynthesisConfig,)),
    ("trainer/evals/", (EvaluateConfig, *TRAINING)),
    ("trainer/inference/", INFERENCE),
    ("trainer/weights/", (ExportConfig, EvaluateConfig, *INFERENCE, *TRAINING)),
    ("trainer/loop/", TRAINING),
    ("trainer/stages/", TRAINING),
    ("", (PrepConfig, FetchConfig, *TRAINING, SynthesisConfig, EvaluateConfig, ExportConfig, *INFERENCE)),
)
# Words with an underscore that are no settings: fields of files and parameters of others.
FIELDS = set(
    "acc_norm api_key background_seconds blocked_seconds data_prep digest_size generation_kwargs library_name "
    "max_completion_tokens "
    "limit_usd lm_eval machines_usd model_type pipeline_tag spent_usd step_seconds trust_remote_code "
    "usd_per_hour vocab_size zero_out".split()
)
# Commands of others, up to where the sentence goes on.
FOREIGN = re.compile(
    r"hf download --repo-type dataset OWNER/NAME|curl -LO \S+|lm_eval ls tasks|sudo ss -ltnp|jq -c|sky launch --env"
    r"|torchrun (?:with )?--nproc-per-node|az storage container create --account-name| --endpoint-url"
    r"|sky status --refresh|model\.save_pretrained\(FOLDER\)"
)
# What a user replaces, in capitals with an underscore.
PLACEHOLDERS = {"RUN_OR_CHECKPOINT", "FOLDER_OR_NAME", "NAME", "section.key", "run.json"}


@dataclass(frozen=True)
class Message:
    """A text with `{expression}` where values go. `error` is the class that is raised, empty for another literal."""

    path: str
    line: int
    error: str
    text: str

    def fits(self, said: str) -> bool:
        """Whether `said` holds this message with values in its holes."""
        literals = [re.escape(part) for part in re.split(r"\{[^{}]*\}", self.text)]
        return sum(map(len, literals)) > 12 and re.search(".*?".join(literals), said, re.S) is not None


@functools.cache
def trees() -> dict[str, ast.Module]:
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


@functools.cache
def nodes() -> dict[str, list[ast.AST]]:
    """All nodes of each file: to walk a tree takes long, and several searches need it."""
    return {path: list(ast.walk(tree)) for path, tree in trees().items()}


@functools.cache
def error_classes() -> frozenset[str]:
    """LauncherError and all that derive from it."""
    classes = [node for each in nodes().values() for node in each if isinstance(node, ast.ClassDef)]
    found: set[str] = set()
    names = {"LauncherError"}
    while names - found:
        found |= names
        names = {each.name for each in classes if any(_name(base) in found for base in each.bases)}
    return frozenset(found)


@functools.cache
def messages() -> tuple[Message, ...]:
    """What is raised: every call of an error class, and every `require` of a schema."""
    found = []
    raised = error_classes() | {"require"}
    for path, every in nodes().items():
        for call in (node for node in every if isinstance(node, ast.Call)):
            name = _name(call.func)
            if name in raised and call.args:
                arguments = call.args[1:] if name == "require" else call.args
                found.append(Message(path, call.lineno, name, ": ".join(_text(each) for each in arguments)))
    return tuple(found)


@functools.cache
def sentences() -> tuple[Message, ...]:
    """All other literals of several words: parts of messages that are put together, help, warnings. No docstrings."""
    found = []
    for path, every in nodes().items():
        inside = {id(part) for node in every if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        inside -= {id(node) for node in every if isinstance(node, ast.JoinedStr)}
        docstrings = {id(node.value) for node in every if isinstance(node, ast.Expr)}
        for node in every:
            is_text = isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)
            if is_text and id(node) not in inside | docstrings and " " in _text(node).strip():
                found.append(Message(path, node.lineno, "", _text(node)))
    return tuple(found)


@functools.cache
def names(message: Message) -> list[tuple[str, str]]:
    """(kind, name) of each thing that a user reads as something to type, set, run or open."""
    text = FOREIGN.sub("", re.sub(r"\{[^{}]*\}", "{}", message.text))
    found = [("module", name) for name in re.findall(r"(?<!\S)-m ([a-z_]+\.[\w.]*\w)", text)]
    found += [
        ("target", name) for name in re.findall(r"(?:`|\(|: |[-,] )make ([a-z][a-z-]+)(?=[`),;.]|\)| [A-Z{])", text)
    ]
    found += [("flag", name) for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text)]
    found += [
        ("setting", name) for name in re.findall(rf"(?<![\w./-])((?:{'|'.join(sections())})\.[a-z]\w*)(?![\w(])", text)
    ]
    found += [("word", name) for name in re.findall(r"(?<![\w./{-])([a-z]+(?:_[a-z]+)+)(?![\w.(/{])", text)]
    found += [
        ("variable", name) for name in re.findall(r"(?<![\w.=/-])([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?![\w{-])", text)
    ]
    found += [("variable", name) for name in re.findall(r"(?<![\w.{/-])([A-Z]{3,})=", text)]
    found += [
        ("file", name)
        for name in re.findall(r"(?<![\w./])((?:sky|docs|launch|requirements)/[\w.-]+\.[a-z]+|\w+\.py)\b", text)
    ]
    found += [("extra", name) for name in re.findall(r"\.\[(\w+)\]", text)]
    found += [("package", name) for name in re.findall(r"pip install ([a-z][\w-]+)", text)]
    if message.path in ("trainer/inference/chat.py", "trainer/inference/terminal.py"):
        found += [("command", name) for name in re.findall(r"(?<!\S)/([a-z]+)", text)]
    return [each for each in found if each[1] not in PLACEHOLDERS]


def missing(message: Message) -> list[tuple[str, str]]:
    """What a message names that does not exist for the programs that raise it."""
    # A message that names a program may name its settings.
    path = "" if any(kind == "module" for kind, _ in names(message)) else message.path
    return [(kind, name) for kind, name in names(message) if not is_there(kind, name, path)]


def unquoted(message: Message) -> list[str]:
    """The places in a command that is printed to be copied, which a shell would cut at a blank or an `&`."""
    holes = re.findall(r"(?:-m (?!torch)[a-z_]+\.\w+|curl -LO)(?: \w+)? \{([^}]*)\}", message.text)
    return [hole for hole in holes if "quote(" not in hole and hole not in ("kind", "places")]


def is_there(kind: str, name: str, path: str) -> bool:
    """Whether a thing exists, for the programs that raise the messages of the file `path`."""
    if kind == "module":
        file = ROOT / name.replace(".", "/")
        return file.with_suffix(".py").exists() or (file / "__main__.py").exists()
    if kind == "flag":
        return name.replace("-", "_") in settings_of(path) or name in own_flags()
    if kind == "setting":
        return name in settings_of(path) or name in renamed.RENAMED
    if kind == "word":
        return name in FIELDS | task_fields() or any(key.rpartition(".")[2] == name for key in settings_of(path))
    if kind == "file":
        return (ROOT / name).exists() or "TASK" in name
    known = {
        "target": targets,
        "variable": known_variables,
        "extra": lambda: project()["optional-dependencies"],
        "package": packages,
        "command": chat_commands,
    }
    return name in known[kind]()


@functools.cache
def sections() -> frozenset[str]:
    return frozenset(key.rpartition(".")[0] for key in settings_of("") if "." in key)


def settings_of(path: str) -> frozenset[str]:
    """Every setting of the programs that raise the messages of a file."""
    return _settings(next(schemas for folder, schemas in SCHEMAS if path.startswith(folder)))


@functools.cache
def _settings(schemas: tuple[type, ...]) -> frozenset[str]:
    return frozenset(
        key for schema in schemas for key in re.findall(r"^  --([\w.]+)=", loader.help_text(schema, ""), re.M)
    )


@functools.cache
def own_flags() -> frozenset[str]:
    """Flags of the programs without a schema: in their usage, or compared with an argument, or given to argparse."""
    texts = [
        node.value
        for each in nodes().values()
        for node in each
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    alone = [text for text in texts if re.fullmatch(r"--[a-z][\w-]*", text)]
    return frozenset(re.findall(r"(?:^|\[)--([a-z][\w-]*)", "\n".join([*alone, *texts]), re.M))


@functools.cache
def targets() -> frozenset[str]:
    text = "".join((ROOT / name).read_text() for name in ("Makefile", "launch/targets.mk"))
    return frozenset(re.findall(r"^([a-z][a-z-]*):", text, re.M))


@functools.cache
def known_variables() -> frozenset[str]:
    makefiles = "".join((ROOT / name).read_text() for name in ("Makefile", "launch/targets.mk"))
    ours = re.findall(r"\$\((?:if |or |filter bucket,)?\$?\(?([A-Z_]{3,})[),]", makefiles)
    ours += re.findall(r"(?:value |call typed,)([A-Z_]{3,})", makefiles)
    return frozenset([*variables.in_example(), *variables.in_document(), *ours])


@functools.cache
def task_fields() -> frozenset[str]:
    """Of the files in sky/."""
    tasks = "".join(path.read_text() for path in (ROOT / "sky").glob("*.yaml"))
    return frozenset(re.findall(r"^ +(?:- )?([a-z_]+):", tasks, re.M))


@functools.cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@functools.cache
def packages() -> frozenset[str]:
    needed = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return frozenset(re.match(r"[\w-]+", package)[0] for each in needed for package in each)


@functools.cache
def chat_commands() -> frozenset[str]:
    text = (ROOT / "trainer/inference/chat.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r"def do_([a-z]+)\(", text))


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _text(node: ast.expr) -> str:
    """A text with `{expression}` for what is not literal; of a choice the first branch, then the second."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    return "{" + re.sub(r"[{}]", "", ast.unparse(inner)) + "}"


def naming() -> Iterator[tuple[Message, list[tuple[str, str]]]]:
    """Each message of an error that names something."""
    for message in messages():
        if found := names(message):
            yield message, found


if __name__ == "__main__":
    for message, found in naming():
        print(f"{message.path}:{message.line}: {', '.join(f'{kind} {name}' for kind, name in found)}")
    print(
        f"{len(messages())} messages, of which {len(list(naming()))} name something; {len(sentences())} other sentences"
    )
