"""Dump: what the compiler saw, as text and as HTML pages, where FXPRUNE_DUMP names a folder."""

import html
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxprune.channels.analysis import Analysis, analyze
from fxprune.errors import FxpruneError
from fxprune.graph.traced import Model, regions_of
from fxprune.plan import Plan

STYLE = (
    "body{font:14px system-ui;margin:2em;color-scheme:light dark}pre{overflow:auto;border:1px solid #8886;padding:1em}"
    "summary{cursor:pointer;font-weight:600;margin:.5em 0}"
)


@dataclass
class Dump:
    """Writes numbered snapshots into ``folder``; does nothing without one."""

    folder: Path | None
    example_inputs: Any = None
    pages: list[tuple[str, str]] = field(default_factory=list)  # title and HTML of each snapshot

    @classmethod
    def from_environment(cls, example_inputs: Any = None) -> "Dump":
        """A dump into the folder that FXPRUNE_DUMP names."""
        folder = os.environ.get("FXPRUNE_DUMP")
        return cls(Path(folder) if folder else None, example_inputs)

    def write(self, title: str, module: Model, analysis: Analysis | None = None, plan: Plan | None = None) -> None:
        """Write the graphs of ``module`` and, as far as they are known, its groups and the plan."""
        if self.folder is None:
            return
        parts = [
            f"# {mode.value} graph{' of ' if path else ''}{path}\n{graph}"
            for path, region in regions_of(module).items()
            for mode, graph in region.distinct_graphs().items()
        ]
        if analysis is None and self.example_inputs is not None:
            try:
                analysis = analyze(module, self.example_inputs)
            except FxpruneError as error:
                parts.append(f"# groups\n{error}")
        if analysis is not None:
            parts.append(f"# groups\n{analysis}")
        if plan is not None:
            parts.append(f"# plan\n{plan}")
        text = "\n\n".join(parts) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{len(self.pages):03}_" + re.sub(r"\W+", "_", title)
        (self.folder / f"{name}.txt").write_text(text, encoding="utf-8")
        link = ""
        if analysis is not None:
            analysis.to_html(self.folder / f"{name}.html")
            link = f'<p><a href="{name}.html">graph and groups as a picture</a></p>'
        self.pages.append((title, f"{link}<pre>{html.escape(text)}</pre>"))
        sections = "".join(
            f"<details{' open' if i == len(self.pages) - 1 else ''}><summary>{i:03} {html.escape(title)}</summary>"
            f"{body}</details>"
            for i, (title, body) in enumerate(self.pages)
        )
        page = (
            f"<!doctype html><meta charset=utf-8><title>fxprune</title><style>{STYLE}</style><h1>fxprune</h1>{sections}"
        )
        (self.folder / "index.html").write_text(page, encoding="utf-8")
