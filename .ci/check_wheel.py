"""Compare the installed fxprune with the checkout, file by file, import every module, and run the README's first call.

    python -I .ci/check_wheel.py

with the Python of an environment that has the wheel: everything must work without the extras.
"""

import importlib
import os
import re
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

# The package must work without its extras. Only the modules named after a framework need that framework, and pictures
# need matplotlib: a page is written without them where that is missing.
FRAMEWORKS = ("lightning", "accelerate", "transformers")
for extra in ("matplotlib", "sklearn", "pytest", "hypothesis", "torch_pruning", *FRAMEWORKS):
    sys.modules[extra] = None  # type: ignore[assignment]


def modules(package: str, folder: Path) -> set[str]:
    """The dotted names of the modules under a folder that holds the named package."""
    parts = (path.relative_to(folder).with_suffix("").parts for path in folder.rglob("*.py"))
    return {".".join((package, *part)).removesuffix(".__init__") for part in parts}


expected = modules("fxprune", CHECKOUT / "fxprune") | modules("fxprune.passes", CHECKOUT / "passes")
installed = Path(importlib.import_module("fxprune").__file__ or "").parent
if installed.is_relative_to(CHECKOUT):
    sys.exit("fxprune was imported from the checkout, not from the wheel")
found = modules("fxprune", installed)
if found != expected:
    sys.exit(f"the wheel lacks {sorted(expected - found)}, has besides {sorted(found - expected)}")
for name in ("py.typed", "report/report.html"):
    if not (installed / name).exists():
        sys.exit(f"the wheel lacks fxprune/{name}")
for name in sorted(found):
    if name.rpartition(".")[2] not in (*FRAMEWORKS, "pictures"):
        importlib.import_module(name)
print(f"the wheel holds all {len(found)} modules, and each imports without the extras")

readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
first = re.search(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
if first is None:
    sys.exit("the README shows no call")
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    exec(compile(first[1], "README.md", "exec"), {"__name__": "__main__"})
    os.chdir("/")
