"""Lines of Python by room: `make lines`. A room that grows says why in the changelog."""

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def count_lines() -> Counter[tuple[str, str]]:
    """The lines and files of each room: a folder in fxprune/ or passes/, or the files that lie in these themselves."""
    counts = Counter[tuple[str, str]]()
    for path in (path for house in ("fxprune", "passes") for path in (ROOT / house).rglob("*.py")):
        house, *inner = path.relative_to(ROOT).parts[:-1]
        room = "/".join((house, *inner[:1]))
        counts[room, "lines"] += len(path.read_text(encoding="utf-8").splitlines())
        counts[room, "files"] += 1
    return counts


counts = count_lines()
rooms = sorted({room for room, _ in counts})
for room in rooms:
    print(f"{room:24} {counts[room, 'files']:4} files {counts[room, 'lines']:7,} lines")
total = [sum(counts[room, what] for room in rooms) for what in ("files", "lines")]
print(f"{'in all':24} {total[0]:4} files {total[1]:7,} lines")
