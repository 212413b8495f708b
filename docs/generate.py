"""What mkdocs makes while it builds: pictures, tables of what is supported, and the results of the benchmarks.

A page asks for a text with a comment: ``<!-- operators -->``, ``<!-- models -->``, ``<!-- results NAME -->`` for
benchmarks/results/NAME.md, ``<!-- others -->`` for the results that no page names, ``<!-- example NAME -->`` for
examples/NAME. A comment that nothing answers ends the build.
"""

import html.parser
import inspect
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from fxprune.channels import tensor

sys.path.insert(0, str(Path(__file__).parent))
import pictures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FAMILIES = {
    "movement": "Move positions",
    "pointwise": "Work position by position",
    "contraction": "Multiply: convolutions, products, attention",
    "reduction": "Reduce and pool",
    "normalization": "Normalize",
    "custom": "Registered by their letters",
}


def on_files(files, config):
    """Add the pictures, drawn now, and those of the results."""
    for name, draw in pictures.PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=draw()))
    for path in RESULTS.glob("*.png"):
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put the texts in the place of their comments."""

    def text(comment):
        kind, _, name = comment[1].partition(" ")
        if kind not in TEXTS:
            raise PluginError(f"{page.file.src_uri}: nothing makes {comment[0]!r}; there are {', '.join(TEXTS)}")
        return TEXTS[kind](*filter(None, [name]))

    markdown = re.sub(r"^<!-- ([a-z]+(?: \S+)?) -->$", text, markdown, flags=re.MULTILINE)
    return markdown.replace("PICTURES/", "../" * page.file.src_uri.count("/") + "pictures/")


def on_post_build(config):
    """Refuse pages that load something from elsewhere: the site is read offline."""
    for path in Path(config.site_dir).rglob("*.html"):
        loads = Loads()
        loads.feed(path.read_text(encoding="utf-8"))
        if loads.found:
            raise PluginError(f"{path.relative_to(config.site_dir)} loads {', '.join(sorted(loads.found))}")


class Loads(html.parser.HTMLParser):
    """The addresses on other hosts that a page loads by itself; links that wait for a click are none."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        loaded = tag in ("script", "img", "iframe", "source") or "stylesheet" in (values.get("rel") or "")
        address = values.get("src") or values.get("href") or ""
        if loaded and re.match(r"(https?:)?//", address):
            self.found.add(address)


def operators():
    """The names of all operators with a rule, by family, and where the rules are."""
    families = defaultdict(set)
    for name, rule in tensor.RULES.items():
        function = getattr(rule, "func", rule)  # custom operators have a partial
        families[Path(inspect.getfile(inspect.unwrap(function))).stem].add(name)
    lost = families.keys() - FAMILIES.keys()
    if lost:
        raise PluginError(f"docs/generate.py has no heading for the operators of {', '.join(sorted(lost))}")
    parts = []
    for family, heading in FAMILIES.items():
        names = " ".join(f"`{name}`" for name in sorted(families[family]))
        parts.append(f"**{heading}** (`fxprune/ops/{family}.py`):\n\n{names}")
    return "\n\n".join(parts)


def models():
    """The zoo, one line a model: what was measured on all of torchvision's models."""
    rows = read_rows("zoo")
    lines = [
        "| model | kind | channels | frozen | FLOPs left | difference | ONNX |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        law = max(value for value in (row["outputs"], row["gradients"]) if value is not None)
        match row["onnx"]:  # what benchmarks/zoo.py records: a difference, why there is none, or nothing yet
            case None:
                onnx = "not measured"
            case {"error": _}:
                onnx = "refused"
            case difference:
                onnx = f"{difference:.0e}"
        kind = row["kind"].replace("_", " ")
        lines.append(
            f"| {row['model']} | {kind} | {row['channels']:,} | {row['frozen']:.1%} | {row['flops']:.1%} "
            f"| {law:.0e}{' (float32)' if row['dtype'] == 'float32' else ''} | {onnx} |"
        )
    return f"{len(rows)} models:\n\n" + "\n".join(lines)


def read_rows(name):
    """What ``benchmarks/zoo.py`` recorded, a dict for each model."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def libraries():
    """The models of other libraries, one line each: what was measured, or why not."""
    rows = read_rows("zoo_libraries")
    good = [row for row in rows if "error" not in row]
    whole = [row for row in good if not row["regions"]]
    exact = sum(row["dtype"] == "float64" for row in whole)
    equal = sum(isinstance(row["onnx"], float) for row in good)
    lines = [
        f"{len(rows)} models: {len(good)} are pruned to half, {len(whole)} of these as whole graphs, {exact} of those "
        f"held to the law in float64; {equal} give in onnxruntime what they give in PyTorch.",
        "",
        "| library | model | graphs | frozen | FLOPs left | difference | ONNX |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        library, _, model = row["model"].partition(":")
        if "error" in row:
            lines.append(f"| {library} | {model} | {in_cell(row['error'])} | | | | |")
            continue
        graphs = f"{len(row['regions'])} regions: {in_cell(row['why'])}" if row["regions"] else row["graphs"]
        law = max(row["outputs"], row["gradients"] or 0)
        onnx = f"{row['onnx']:.0e}" if isinstance(row["onnx"], float) else "refused" if row["onnx"] else "not measured"
        lines.append(
            f"| {library} | {model} | {graphs} | {row['frozen']:.1%} | {row['flops']:.1%} "
            f"| {law:.0e}{' (float32)' if row['dtype'] == 'float32' else ''} | {onnx} |"
        )
    return "\n".join(lines)


def in_cell(message):
    """A message in a cell of a table."""
    return message[:300].replace("|", "/")


def results(name):
    """What a benchmark wrote: without its title, headings a level lower, with the file that it stands in."""
    path = RESULTS / f"{name}.md"
    if not path.exists():
        raise PluginError(f"there is no {path.relative_to(ROOT)}")
    _, _, text = path.read_text(encoding="utf-8").partition("\n")
    text = re.sub(r"^#", "##", text.strip(), flags=re.MULTILINE)
    text = re.sub(r"(!\[[^]]*\]\()(?!http)", r"\1PICTURES/", text)
    text = re.sub(r"(?<!!)\[([^]]*)\]\([^)]*\.md\)", r"`benchmarks/results/\1`", text)
    return f"{text}\n\nThis stands in `benchmarks/results/{name}.md`."


def others():
    """The results that no page asks for by name, each under its title."""
    pages = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("*.md"))
    asked = re.findall(r"^<!-- results (\S+) -->$", pages, re.MULTILINE)
    parts = []
    for path in sorted(RESULTS.glob("*.md")):
        if path.stem not in {*asked, "zoo", "zoo_libraries"}:  # the zoos are the tables of models
            title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            parts.append(f"## {title}\n\n{results(path.stem)}")
    return "\n\n".join(parts)


def example(name):
    """The code of an example."""
    path = ROOT / "examples" / name
    if not path.exists():
        raise PluginError(f"there is no {path.relative_to(ROOT)}")
    return f"```python\n{path.read_text(encoding='utf-8').rstrip()}\n```"


TEXTS = {
    "operators": operators,
    "models": models,
    "libraries": libraries,
    "results": results,
    "others": others,
    "example": example,
}
